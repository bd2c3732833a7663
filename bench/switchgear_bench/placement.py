"""Placement policies against each other: on the window they were given, on the next one, and how long they think.

Plans are made from windows up to now and judged by the next one: its mean predicted step (the product's cost model)
with rows split over replicas as the router's `lp` does it, and in equal shares, which is what EPLB assumes.

Letters: W windows, L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear.placement.eplb import Eplb
from switchgear.placement.plan import arrange, presence
from switchgear.placement.policy import POLICIES, CostModel, PlacementProblem, Topology
from switchgear.placement.score import balanced_split, equal_split, rank_rows, step_time_s
from switchgear_bench.placement_policies import Contender, as_published, contenders
from switchgear_bench.placement_traffic import Int64, drifting_windows, skewed_window
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.routing_trace import RoutingTrace
from switchgear_runtime.placement.planner import Int32

HISTORY_WINDOWS = 8
Row = dict[str, Any]

# The bundled model on this machine's class of cores; DeepSeek-V3-like experts in FP8 on a GPU of 400 TFLOP/s and 3 TB/s.
TINY = CostModel(
    expert_bytes=3 * 256 * 128 * 2,
    row_flops=6.0 * 256 * 128,
    row_bytes=4.0 * 256,
    memory_bytes_per_s=30e9,
    flops_per_s=300e9,
    transport_bytes_per_s=10e9,
    move_bytes_per_s=30e9,
)
LARGE = CostModel(
    expert_bytes=3 * 7168 * 2048,
    row_flops=6.0 * 7168 * 2048,
    row_bytes=3.0 * 7168,
    memory_bytes_per_s=3e12,
    flops_per_s=400e12,
    transport_bytes_per_s=50e9,
    move_bytes_per_s=50e9,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """One case of consecutive windows."""

    name: str
    windows_WLE: Int64
    num_ranks: int
    slots_per_rank: int
    cost: CostModel
    num_steps: int  # of a window


def drift_cases(trace: RoutingTrace | None, num_windows: int) -> Iterator[Drift]:
    """Prefill: few steps with many rows each; decode: many steps with few."""
    if trace is not None:
        steps = max(1, round(float(np.mean([window.end_step - window.begin_step for window in trace]))))
        for num_ranks, slots in ((4, 10), (8, 5)):
            for num_steps in (1, steps):
                yield Drift(
                    name=f"recorded, {num_ranks} ranks, {num_steps} step{'s' * (num_steps > 1)} a window",
                    windows_WLE=trace.routed_WLE,
                    num_ranks=num_ranks,
                    slots_per_rank=slots,
                    cost=TINY,
                    num_steps=num_steps,
                )
    large = {"num_ranks": 32, "slots_per_rank": 9, "cost": LARGE}
    prefill = drifting_windows(num_windows, 4, 256, 32 * 4096 * 200, seed=1)
    yield Drift(name="synthetic prefill", windows_WLE=prefill, num_steps=200, **large)  # type: ignore[arg-type]
    decode = drifting_windows(num_windows, 4, 256, 32 * 8 * 8 * 1000, seed=2)
    yield Drift(name="synthetic decode", windows_WLE=decode, num_steps=1000, **large)  # type: ignore[arg-type]


def next_window_rows(case: Drift) -> list[Row]:
    """A row for each contender."""
    rows: list[Row] = []
    budget = 0
    for contender in contenders():
        row = _follow(case, contender, budget if contender.budgeted else None)
        rows.append(row)
        if contender.name == "eplb":
            budget = row["bytes"] // (2 * row["num_windows"])
        assert not contender.budgeted or row["bytes"] <= rows[0]["bytes"] // 2
    for row in rows:
        for field in ("mean_s", "p99_s", "bytes"):
            row[f"{field}_over_eplb"] = row[field] / rows[0][field] if rows[0][field] else None
    return rows


def _follow(case: Drift, contender: Contender, byte_budget: int | None) -> Row:
    num_layers, num_experts = case.windows_WLE.shape[1:]
    problem = PlacementProblem(
        topology=Topology.even(case.num_ranks),
        slots_per_rank=case.slots_per_rank,
        cost=case.cost,
        byte_budget=byte_budget,
        num_steps=case.num_steps,
    )
    expert_map = ExpertMap.contiguous(num_layers, num_experts, case.num_ranks)
    published_LP = None
    times_s, equal_s, ratios, plans_s, num_bytes = [], [], [], [], 0
    for now in range(len(case.windows_WLE) - 1):
        if now % contender.every == 0:
            began = time.perf_counter()
            history = case.windows_WLE[max(0, now + 1 - HISTORY_WINDOWS) : now + 1]
            plan = contender.policy.plan(history, expert_map, problem)
            plans_s.append(time.perf_counter() - began)
            expert_map, num_bytes = plan.expert_map, num_bytes + plan.moved_bytes
            if contender.published is not None:
                published_LP = contender.published(history, problem)
        load_LE = case.windows_WLE[now + 1]
        split_LP = balanced_split(load_LE, expert_map)
        times_s.append(step_time_s(split_LP, problem))
        equal_LP = equal_split(load_LE, expert_map) if published_LP is None else published_split(load_LE, published_LP)
        equal_s.append(step_time_s(equal_LP, problem))
        rows_LR = rank_rows(split_LP, case.num_ranks)
        ratios.append(float(rows_LR.max(axis=1).sum() / rows_LR.mean(axis=1).sum()))
    return {
        "part": "next window",
        "case": case.name,
        "num_steps": case.num_steps,
        "policy": contender.name,
        "num_windows": len(times_s),
        "mean_s": float(np.mean(times_s)),
        "p99_s": float(np.percentile(times_s, 99)),
        "equal_shares_mean_s": float(np.mean(equal_s)),
        "equal_shares_p99_s": float(np.percentile(equal_s, 99)),
        "max_over_mean": float(np.mean(ratios)),
        "bytes": num_bytes,
        "byte_budget_per_plan": byte_budget,
        "plan_s_median": float(np.median(plans_s)),
    }


def published_split(load_LE: Int64, physical_LP: Int32) -> NDArray[np.float64]:
    """Rows [L, P] in equal shares over all slots, where a rank may have an expert twice. Two slots read their weights twice."""
    rows_LP = np.empty(physical_LP.shape)
    for rows_P, load_E, physical_P in zip(rows_LP, load_LE, physical_LP, strict=True):
        rows_P[:] = (load_E / np.bincount(physical_P, minlength=len(load_E)))[physical_P]
    return rows_LP


def given_window_rows(num_seeds: int) -> list[Row]:
    """Without a budget, on the very window the plan was made for: maximum over mean of the ranks' rows."""
    shapes = ((256, 32, 9), (256, 64, 5), (128, 8, 18))
    cost = replace(LARGE, memory_bytes_per_s=1e18)  # rows alone count
    return [
        _given_window(kind, *shape, cost=cost, num_seeds=num_seeds)
        for shape in shapes
        for kind in ("zipf", "lognormal")
    ]


def _given_window(kind: str, experts: int, ranks: int, slots: int, *, cost: CostModel, num_seeds: int) -> Row:
    found: dict[str, list[float]] = {
        name: [] for name in ("contiguous", "eplb, equal shares", "eplb", "adaptive", "bound")
    }
    for seed in range(num_seeds):
        load_LE = skewed_window(kind, 1, experts, ranks * 4096 * 8, seed=seed)
        problem = PlacementProblem(topology=Topology.even(ranks), slots_per_rank=slots, cost=cost)
        start = ExpertMap.contiguous(1, experts, ranks)
        current = arrange(presence(start), start, slots)
        eplb = Eplb().plan(load_LE, current, problem).expert_map
        ours = POLICIES["adaptive"]().plan(load_LE, current, problem).expert_map
        mean = load_LE.sum() / ranks
        rows_of = {
            "contiguous": balanced_split(load_LE, current),
            "eplb, equal shares": published_split(load_LE, as_published(load_LE[None], problem)),
            "eplb": balanced_split(load_LE, eplb),
            "adaptive": balanced_split(load_LE, ours),
        }
        for name, rows_LP in rows_of.items():
            found[name].append(float(rank_rows(rows_LP, ranks).max() / mean))
        found["bound"].append(max(1.0, float(load_LE.max() / ranks / mean)))
        assert found["adaptive"][-1] <= found["eplb"][-1] * (1 + 1e-9), f"seed {seed}"
    return {
        "part": "given window",
        "case": f"{kind}, {experts} experts, {ranks} ranks, {slots} slots",
        "num_seeds": num_seeds,
        "max_over_mean": {name: float(np.mean(values)) for name, values in found.items()},
        "worst": {name: float(np.max(values)) for name, values in found.items()},
    }


def plan_time_rows(num_repeats: int) -> list[Row]:
    """64 ranks x 61 layers x 256 experts, all layers of a plan: the first one, and those of a running system."""
    num_layers, experts, ranks, slots = 61, 256, 64, 5
    rows = []
    for policy in ("eplb", "incremental", "adaptive"):
        windows = drifting_windows(HISTORY_WINDOWS + num_repeats, num_layers, experts, ranks * 4096 * 64, seed=3)
        problem = PlacementProblem(
            topology=Topology.even(ranks, 8),
            slots_per_rank=slots,
            cost=LARGE,
            byte_budget=1000 * LARGE.expert_bytes,
            num_steps=64,
        )
        if policy == "eplb":
            problem = replace(problem, byte_budget=None)
        expert_map = ExpertMap.contiguous(num_layers, experts, ranks)
        times_s = []
        for now in range(1, len(windows)):
            began = time.perf_counter()
            plan = POLICIES[policy]().plan(windows[max(0, now - HISTORY_WINDOWS) : now], expert_map, problem)
            times_s.append(time.perf_counter() - began)
            expert_map = plan.expert_map
        rows.append({
            "part": "plan time",
            "policy": policy,
            "first_s": times_s[0],
            "median_s": float(np.median(times_s[HISTORY_WINDOWS:])),
            "max_s": float(np.max(times_s)),
            "num_plans": len(times_s),
        })  # fmt: skip
    return rows


def check(rows: Sequence[Row]) -> list[str]:
    """What adaptive does not keep of its promise, in words; empty when it keeps all."""
    return [
        f"{row['case']}: {field} is {row[f'{field}_over_eplb']:.3f} of EPLB's; {most} is the limit"
        for row in rows
        if row["part"] == "next window" and row["policy"] == "adaptive"
        for field, most in (("mean_s", 1.0), ("p99_s", 1.0), ("bytes", 0.5))
        if row[f"{field}_over_eplb"] > most
    ]
