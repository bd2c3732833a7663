"""The startup benchmark: every process is counted, and a start without its evidence is refused."""

from __future__ import annotations

from typing import Any

import pytest

from switchgear.config import bundled_model
from switchgear_bench import startup
from switchgear_bench.startup_worker import rank_report

LOG = (
    "2026-01-01 rank 0 INFO m: weights: 3 mapped, 4 packed, 0 private\n"
    "2026-01-01 rank 0 INFO m: imported torch in 1.25 s, loaded weights in 0.50 s\n"
)


def test_the_slowest_rank_counts() -> None:
    report = rank_report([LOG, LOG.replace("1.25", "2.00")])
    assert report == {"rank_import_s": 2.0, "rank_load_s": 0.5, "blobs": {"mapped": 6, "packed": 8, "private": 0}}


def test_a_rank_without_a_report_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 ranks"):
        rank_report([LOG, ""])


@pytest.mark.parametrize("lie", [{"tokens": [[2]]}, {"blobs": {"packed": 1}}])
def test_a_warm_start_that_was_none_is_refused(monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]) -> None:
    cold = {"tokens": [[1]], "blobs": {"packed": 7}}
    starts = iter([cold, cold | {"blobs": {"mapped": 7, "packed": 0}} | lie])
    monkeypatch.setattr(startup, "_start", lambda _task: next(starts))
    with pytest.raises(RuntimeError, match="warm start"):
        list(startup.run("", [1], num_repeats=1, settings={"launcher": "local"}))


@pytest.mark.ranks
def test_rows_of_the_bundled_model() -> None:
    rows = list(startup.run(str(bundled_model()), [2], num_repeats=1, settings={"launcher": "local"}))
    assert [row["num_repeats"] for row in rows] == [1, 1]
    for row in rows:
        assert 0 < row["import_s"] < row["ready_s"] < row["first_token_s"]
        by_process = row["pss_bytes_by_process"]
        assert len(by_process["ranks"]) == 2 and len(by_process["driver"]) == 1 and row["num_processes"] == 3
        assert all(num_bytes > 1 << 20 for kind in by_process.values() for num_bytes in kind)
        assert row["pss_bytes"] == sum(map(sum, by_process.values()))
