"""`switchgear replay`: policies are scored on the window that follows, and live ranks get the load that the trace has."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from served_process import start_server, stop_server

from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear.placement.policy import POLICIES, PlacementPlan, PlacementProblem, Topology
from switchgear.traces.live_replay import distance
from switchgear.traces.replay import cost_of, replay, summary
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace


def make_problem(num_ranks: int, num_experts: int) -> PlacementProblem:
    return PlacementProblem(
        topology=Topology(num_ranks=num_ranks, hosts=("",) * num_ranks),
        slots_per_rank=-(-num_experts // num_ranks) + 1,
        cost=cost_of(load_spec(bundled_model()), "bfloat16", "none"),
    )


def write_trace(path: Path, seed: int, num_windows: int, *, hot_for: int = 1) -> RoutingTrace:
    """Of the bundled model's shape; another quarter of the experts is hot after every so many windows."""
    rng = np.random.default_rng(seed)
    windows = []
    for i in range(num_windows):
        routed_SLE = rng.integers(1, 10, (2, 4, 32))
        routed_SLE[:, :, 8 * (i // hot_for % 4) : 8 * (i // hot_for % 4) + 8] *= 8
        windows.append(LoadWindow(begin_step=10 * i, end_step=10 * i + 10, routed_SLE=routed_SLE))
    trace = RoutingTrace.of(windows, top_k=4)
    trace.save(path)
    return trace


class Watcher:
    """Moves nothing and keeps what it was shown."""

    name = "watcher"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def plan(self, windows_WLE: np.ndarray, current: ExpertMap, problem: PlacementProblem) -> PlacementPlan:
        self.seen.append((len(windows_WLE), int(windows_WLE[-1].sum())))
        return POLICIES["static"]().plan(windows_WLE, current, problem)


def test_a_window_is_scored_on_the_plan_of_those_before_it() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    routed_WLE = np.random.default_rng(seed).integers(0, 99, (25, 2, 8))
    policy, problem = Watcher(), make_problem(2, 8)
    replayed = replay(routed_WLE, policy, problem)
    assert policy.seen == [(min(window, 16), int(routed_WLE[window - 1].sum())) for window in range(1, 25)]
    rows_WLR = routed_WLE.reshape(25, 2, 2, 4).sum(axis=3)
    expected = rows_WLR.max(axis=2).sum(axis=1) / rows_WLR.mean(axis=2).sum(axis=1)
    assert np.allclose([window.imbalance for window in replayed], expected[1:]), f"seed {seed}"
    assert summary(replayed)["num_windows"] == 24
    assert summary(replayed)["moved_bytes"] == 0


def test_policies_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.npz"
    write_trace(trace, 3, 6)
    flags = ["--ranks", "4", "--json", str(tmp_path / "rows.json")]
    assert main(["replay", str(trace), "--policies", "static,eplb", "--windows", "5", *flags]) == 0
    assert "static" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["policy"] for row in rows["policies"]] == ["static", "eplb"]
    assert all(row["num_windows"] == 4 and row["step_s_mean"] > 0 for row in rows["policies"])
    assert rows["num_steps"] == 10
    for arguments, what in (
        (["--policies", "best"], "'best' is unknown"),
        (["--windows", "0"], "--windows 0 must be"),
        (["--live", "--url", "http://127.0.0.1:1"], "give one of them"),
    ):
        assert main(["replay", str(trace), *arguments]) == 2
        assert what in capsys.readouterr().err


def test_live_ranks_get_the_load_and_one_rank_gives_the_same_tokens(tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    write_trace(trace, random.SystemRandom().randrange(1 << 30), 3)
    flags = ["--requests", "24", "--output-tokens", "8", "--json"]
    ours = ["--live", "--ranks", "1", "--launcher", "local", "--log-level", "warning"]
    assert main(["replay", str(trace), *ours, *flags, str(tmp_path / "one.json")]) == 0
    forced = ["--forced-routing", str(trace), "--no-enable-prefix-caching"]
    plain = ["--placement", "off", "--lending", "0"]
    process, url = start_server(*forced, *plain, "--ranks", "2", "--log-level", "warning")
    try:
        assert main(["replay", str(trace), "--url", url, *flags, str(tmp_path / "two.json")]) == 0
    finally:
        stop_server(process)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["tokens_digest"] == two["tokens_digest"]
    for result in (one, two):
        assert [window["num_tokens"] for window in result["windows"]] == [24 * 39] * 3
        assert max(window["distance"] for window in result["windows"]) < 0.06
    assert {window["imbalance"] for window in one["windows"]} == {1.0}
    assert all(1.2 < window["imbalance"] <= 2.0 for window in two["windows"])  # the hot quarter is on one rank


@pytest.mark.slow
def test_migration_under_a_forced_load_changes_no_token(tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    write_trace(trace, random.SystemRandom().randrange(1 << 30), 80, hot_for=40)
    flags = ["--live", "--launcher", "local", "--log-level", "warning", "--lending", "0", "--json"]
    moving = ["--placement", "adaptive", "--placement-window-s", "1", "--ranks", "2"]
    results = []
    for name, more in (("still.json", ["--placement", "off", "--ranks", "1"]), ("moving.json", moving)):
        assert main(["replay", str(trace), *flags, str(tmp_path / name), *more]) == 0
        results.append(json.loads((tmp_path / name).read_text()))
    still, moved = results
    assert moved["tokens_digest"] == still["tokens_digest"]
    assert moved["windows"][-1]["epoch"] > 0
    assert moved["windows"][39]["imbalance"] < moved["windows"][0]["imbalance"]


def test_another_load_is_noticed() -> None:
    load_LE = np.array([[4, 4, 0, 0], [1, 1, 1, 1]])
    assert distance(load_LE, 3 * load_LE) == 0
    assert distance(load_LE, np.array([[0, 0, 5, 5], [1, 1, 1, 1]])) == 0.5
    assert distance(np.zeros((2, 4), np.int64), load_LE) == 1
