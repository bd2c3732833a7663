"""`switchgear bench placement`: its rows, its tables, and what EPLB is taken to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from switchgear.cli import main
from switchgear.placement.policy import PlacementProblem, Topology
from switchgear_bench.placement import LARGE, TINY, Drift, check, next_window_rows, published_split
from switchgear_bench.placement_policies import EplbMatched, as_published
from switchgear_bench.placement_traffic import drifting_windows
from switchgear_runtime.moe.expert_map import ExpertMap

ROOT = Path(__file__).resolve().parents[2]


def test_drift_is_reproducible_and_drifts() -> None:
    windows = drifting_windows(6, 2, 16, 10_000, seed=4)
    assert windows.shape == (6, 2, 16)
    assert (windows.sum(axis=2) == 10_000).all()
    assert np.array_equal(windows, drifting_windows(6, 2, 16, 10_000, seed=4))
    assert not np.array_equal(windows[0], drifting_windows(6, 2, 16, 10_000, seed=5)[0])


def test_rows_of_a_case_compare_with_eplb_and_keep_the_budget() -> None:
    windows = drifting_windows(10, 2, 32, 100_000, seed=1)
    case = Drift(name="x", windows_WLE=windows, num_ranks=4, slots_per_rank=10, cost=TINY, num_steps=1)
    rows = {row["policy"]: row for row in next_window_rows(case)}
    assert rows["eplb"]["mean_s_over_eplb"] == rows["eplb"]["bytes_over_eplb"] == 1.0
    assert rows["static"]["bytes"] == 0
    assert 0 < rows["adaptive"]["bytes"] <= rows["eplb"]["bytes"] / 2
    assert rows["eplb, packs matched"]["mean_s"] == pytest.approx(rows["eplb"]["mean_s"])
    assert rows["eplb, packs matched"]["bytes"] <= rows["eplb"]["bytes"]
    worse = replace(case, name="y")
    broken = {**rows["adaptive"], "case": worse.name, "p99_s_over_eplb": 1.5}
    assert check([broken]) == ["y: p99_s is 1.500 of EPLB's; 1.0 is the limit"]


def test_eplb_as_published_shares_equally_over_all_slots() -> None:
    load = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]])
    problem = PlacementProblem(topology=Topology.even(8), slots_per_rank=2, cost=LARGE)
    physical = as_published(load[None], problem)
    rows = published_split(load, physical)
    assert rows.sum() == pytest.approx(load.sum())
    assert physical.shape == rows.shape == (1, 16)


def test_matched_packs_hold_the_same_experts() -> None:
    windows = drifting_windows(2, 1, 16, 10_000, seed=2)
    problem = PlacementProblem(topology=Topology.even(4), slots_per_rank=5, cost=LARGE)
    policy = EplbMatched()
    first = policy.plan(windows[:1], ExpertMap.contiguous(1, 16, 4), problem).expert_map
    again = policy.plan(windows[:1], first, problem)
    assert not again.moves, "the same packs stay where they are"


def test_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "placement.json"
    arguments = ["--windows", "4", "--seeds", "1", "--plans", "0", "--trace", "none", "--output", str(output)]
    assert main(["bench", "placement", *arguments]) in (0, 1)  # four windows are too few to promise anything
    assert "| adaptive |" in capsys.readouterr().out
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {row["part"] for row in result["rows"]} == {"given window", "next window"}
    assert "commit" in result["header"]


def test_committed_rows_keep_the_promise() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "placement.json").read_text(encoding="utf-8"))["rows"]
    assert not check(rows)
    cases = [row for row in rows if row["part"] == "next window" and row["policy"] == "adaptive"]
    assert len(cases) == 6
    assert all(row["num_windows"] >= 200 for row in cases)
