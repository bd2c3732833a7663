"""`switchgear bench balance` end to end, small: even large batches, and what it calls a miss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear_bench import load_recording
from switchgear_bench.balance_command import markdown, misses, recording_line, step_misses


def test_it_writes_rows_and_large_batches_are_even(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--ranks", "8", "--rows-per-rank", "64", "4096", "--num-draws", "2", "--output", str(output)]
    assert main(["bench", "balance", *arguments]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    ours = [row for row in result["rows"] if row["arm"].startswith("ours")]
    assert len(result["rows"]) == 2 * len(ours) == 4 * 2 * 4
    assert all(row["foreign_experts_max"] <= 2 for row in ours)
    assert any(row["foreign_experts_max"] == 2 for row in ours)
    assert all(row["max_over_mean_rows_worst"] <= 1.03 for row in ours if row["rows_per_rank"] == 4096)
    assert result["step"]["cost_before_over_after"] > 1.0
    assert "co-located hot set" in capsys.readouterr().out


def test_a_miss_is_named() -> None:
    row = {
        "num_ranks": 8,
        "traffic": "zipf",
        "rows_per_rank": 4096,
        "arm": "ours on eplb",
        "max_over_mean_rows": 1.02,
        "max_over_mean_rows_worst": 1.05,
        "time_ratio_to_base": 0.9,
        "time_ratio_to_base_worst": 1.01,
        "time_ratio_to_static": 1.2,
        "added_us": 1.0,
    }
    assert len(misses([row])) == 3
    assert misses([{**row, "arm": "eplb"}]) == []
    arms = [{**row, "arm": arm} for arm in ("static", "ours on static", "eplb", "ours on eplb")]
    assert "| 8 | zipf | 4096 | 1.020 |" in markdown(arms)


def test_recording_the_load_is_timed_and_every_pair_was_recorded() -> None:
    recording = load_recording.measure(str(bundled_model()), 3, num_threads=1, num_steps=4, num_repeats=1)
    assert 0 < recording["recording_us"] < recording["step_us"]
    assert recording["fraction"] == pytest.approx(recording["recording_us"] / recording["step_us"])
    step = {"served": {"added_fraction": 0.004}, "recording": {**recording, "fraction": 0.007}}
    assert step_misses(step) == ["recording and choosing take 1.10% of a step"]
    assert not step_misses({"recording": recording})
    assert "Recording the load" in recording_line(recording)
