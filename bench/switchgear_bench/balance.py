"""In-step balance, simulated from counts: replica choice and lending against static slots and against EPLB's even split.

Traffic is drawn, not served: how many of each rank's tokens want each expert in one layer and batch. EPLB plans from an
earlier batch; all arms then meet the same later one. What the slowest rank takes is predicted (rows, and a read of each
expert's weights it touches); what ours adds to a layer (an exchange of counts, the plan) is measured and charged.

Letters: R ranks, E experts, S slots of a rank, I instances of experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.moe.native_quotas import NativeQuotas
from switchgear_runtime.moe.quotas import Balance
from switchgear_runtime.placement import planner

NUM_EXPERTS, TOP_K = 256, 8
NUM_HOT = 8  # a hostile token's k choices
HOSTILE = 0.5  # of all tokens
LENDING = 2
NUM_TIMED = 5
TRAFFIC = ("zipf", "lognormal", "domain switch", "co-located hot set")
PLACEMENTS = ("contiguous", "eplb")
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One rank's rates, and an expert of hidden x ffn in bf16. The exchange is two ranks' over shm, by `bench
    transport`; more ranks take longer, by this factor for each doubling."""

    hidden: int = 2048
    ffn: int = 768
    flops_per_s: float = 206e9
    memory_bytes_per_s: float = 17e9
    exchange_s: float = 5e-6

    @property
    def row_s(self) -> float:
        return 6 * self.hidden * self.ffn / self.flops_per_s

    @property
    def expert_s(self) -> float:
        return 6 * self.hidden * self.ffn / self.memory_bytes_per_s

    @property
    def expert_rows(self) -> int:
        return round(self.expert_s / self.row_s)

    def all_gather_s(self, num_ranks: int) -> float:
        return self.exchange_s * int(num_ranks - 1).bit_length()


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What each rank computes."""

    rows_R: Float64
    touched_R: Int64
    added_s: float = 0.0
    foreign_max: int = 0

    def time_s(self, machine: Machine) -> float:
        return float((self.rows_R * machine.row_s + self.touched_R * machine.expert_s).max()) + self.added_s


def shares(traffic: str, rng: np.random.Generator, held_RS: Int32) -> tuple[Float64, Float64]:
    """(before, now): the share of each expert in an earlier batch and in this one. The attacker knows the placement
    and takes experts of one rank."""
    zipf_E = 1.0 / np.arange(1, NUM_EXPERTS + 1)
    benign_E = rng.permutation(zipf_E) if traffic in ("zipf", "domain switch") else rng.lognormal(0, 1, NUM_EXPERTS)
    benign_E = benign_E / benign_E.sum()
    if traffic == "domain switch":
        return benign_E, rng.permutation(benign_E)
    if traffic == "co-located hot set":
        of_rank = held_RS[int(rng.integers(len(held_RS)))]
        hot_E = np.zeros(NUM_EXPERTS)
        hot_E[of_rank[of_rank >= 0][:NUM_HOT]] = 1.0
        return benign_E, (1 - HOSTILE) * benign_E + HOSTILE * hot_E / hot_E.sum()
    return benign_E, benign_E


def static_split(counts_RE: Int64, held_RS: Int32) -> Split:
    """Of the contiguous map: each expert at its one rank."""
    totals_E = counts_RE.sum(0)
    rows_RS = np.where(held_RS >= 0, totals_E[held_RS], 0)
    return Split(rows_R=rows_RS.sum(1).astype(float), touched_R=(rows_RS > 0).sum(1))


def even_split(counts_RE: Int64, held_RS: Int32) -> Split:
    """Each expert's rows evenly over its replicas, as EPLB has it."""
    totals_E = counts_RE.sum(0)
    replicas_E = np.bincount(held_RS[held_RS >= 0], minlength=NUM_EXPERTS)
    rows_RS = np.where(held_RS >= 0, totals_E[held_RS] / np.maximum(replicas_E[held_RS], 1), 0.0)
    return Split(rows_R=rows_RS.sum(1), touched_R=(rows_RS > 0).sum(1))


def our_split(counts_RE: Int64, held_RS: Int32, quotas: NativeQuotas, machine: Machine) -> Split:
    """By the plan, or by the static slots where that is as good; checked against the counts."""
    num_ranks, num_slots = held_RS.shape
    taken_s = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        quotas.plan(counts_RE, num_ranks - 1)
        taken_s.append(time.perf_counter() - start)
    instances = quotas.explain(counts_RE).instances_I4
    rows_ER = np.zeros((NUM_EXPERTS, num_ranks), np.int64)
    foreign_R = np.zeros(num_ranks, np.int64)
    if instances is None:
        replicas = [np.argwhere(held_RS == expert)[:, 0] for expert in range(NUM_EXPERTS)]
        for source in range(num_ranks):
            for expert in range(NUM_EXPERTS):
                ranks = replicas[expert]
                to = source if source in ranks else ranks[(source + expert) % len(ranks)]
                rows_ER[expert, to] += counts_RE[source, expert]
    else:
        experts, ranks, slots, rows = instances.T
        np.add.at(rows_ER, (experts, ranks), rows)
        np.add.at(foreign_R, ranks[slots % quotas.stride >= num_slots], 1)
    assert np.array_equal(rows_ER.sum(1), counts_RE.sum(0)), "the plan lost rows"
    assert foreign_R.max() <= LENDING, "too many foreign experts"
    return Split(
        rows_R=rows_ER.sum(0).astype(float),
        touched_R=(rows_ER > 0).sum(0),
        added_s=min(taken_s) + machine.all_gather_s(num_ranks),
        foreign_max=int(foreign_R.max()),
    )


def eplb_held(before_E: Float64, num_ranks: int) -> Int32:
    """With one redundant slot a rank. A second replica on a rank is left out, as our maps have it."""
    load_LE = np.round(before_E * 1e9).astype(np.int64)[None]
    slots = NUM_EXPERTS // num_ranks + 1
    held_RS: Int32 = planner.eplb(load_LE, num_ranks * slots, 1, 1, num_ranks)[0].reshape(num_ranks, slots).copy()
    for held_S in held_RS:
        _, first = np.unique(held_S, return_index=True)
        held_S[np.setdiff1d(np.arange(slots), first)] = -1
    held: Int32 = held_RS
    return held


def simulate(
    num_ranks: int, traffic: str, rows_per_rank: int, *, num_draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row an arm: medians over the draws, and the worst of each ratio."""
    machine = Machine()
    balance = Balance(choice="lp", lending=LENDING, expert_rows=machine.expert_rows)
    arms: dict[str, list[Split]] = {}
    for draw in range(num_draws):
        rng = np.random.default_rng([seed, draw, num_ranks, rows_per_rank, TRAFFIC.index(traffic)])
        contiguous_RS = np.arange(NUM_EXPERTS, dtype=np.int32).reshape(num_ranks, -1)
        before_E, _ = shares(traffic, rng, contiguous_RS)
        for placement in PLACEMENTS:
            held_RS = contiguous_RS if placement == "contiguous" else eplb_held(before_E, num_ranks)
            same = np.random.default_rng([seed, draw, num_ranks, rows_per_rank, TRAFFIC.index(traffic)])
            _, now_E = shares(traffic, same, held_RS)
            counts_RE = same.multinomial(rows_per_rank, now_E, num_ranks).astype(np.int64)
            baseline = static_split if placement == "contiguous" else even_split
            quotas = NativeQuotas(held_RS, NUM_EXPERTS, balance)
            name = {"contiguous": "static", "eplb": "eplb"}[placement]
            arms.setdefault(name, []).append(baseline(counts_RE, held_RS))
            arms.setdefault(f"ours on {name}", []).append(our_split(counts_RE, held_RS, quotas, machine))
    time_s = {name: [split.time_s(machine) for split in splits] for name, splits in arms.items()}
    for name, splits in arms.items():
        base = name.removeprefix("ours on ")
        over = [float(split.rows_R.max() / split.rows_R.mean()) for split in splits]
        costs = [split.rows_R + machine.expert_rows * split.touched_R for split in splits]
        ratios = [ours / theirs for ours, theirs in zip(time_s[name], time_s[base], strict=True)]
        yield {
            "num_ranks": num_ranks,
            "traffic": traffic,
            "rows_per_rank": rows_per_rank,
            "arm": name,
            "max_over_mean_rows": statistics.median(over),
            "max_over_mean_rows_worst": max(over),
            "max_over_mean_cost": statistics.median(float(cost.max() / cost.mean()) for cost in costs),
            "time_us": 1e6 * statistics.median(time_s[name]),
            "time_ratio_to_base": statistics.median(ratios),
            "time_ratio_to_base_worst": max(ratios),
            "time_ratio_to_static": statistics.median(time_s[name]) / statistics.median(time_s["static"]),
            "time_ratio_to_eplb": statistics.median(time_s[name]) / statistics.median(time_s["eplb"]),
            "added_us": 1e6 * statistics.median(split.added_s for split in splits),
            "foreign_experts_max": max(split.foreign_max for split in splits),
            "num_draws": num_draws,
        }


def step_cost(num_tokens: int, *, num_layers: int = 12, num_experts: int = 64, seed: int = 1) -> dict[str, Any]:
    """What two ranks add to a step of the bench checkpoint's shape: the plan and the slots, measured on drawn counts,
    and the exchange of `Machine`. Static slots in the same run."""
    rng = np.random.default_rng([seed, num_tokens])
    held_RS = np.arange(num_experts, dtype=np.int32).reshape(2, -1)
    balance = Balance(choice="lp", lending=LENDING, expert_rows=Machine().expert_rows)
    quotas = NativeQuotas(held_RS, num_experts, balance)
    zipf_E = 1.0 / np.arange(1, num_experts + 1)
    ids_RTK = np.stack(
        [
            [rng.choice(num_experts, TOP_K, replace=False, p=zipf_E / zipf_E.sum()) for _ in range(num_tokens // 2)]
            for _ in range(2)
        ]
    ).astype(np.int32)
    counts_RE = np.stack([np.bincount(ids.reshape(-1), minlength=num_experts) for ids in ids_RTK])
    slots_E = np.arange(num_experts, dtype=np.int32)
    times_s: dict[str, list[float]] = {"balanced": [], "static": []}
    for _ in range(500):
        start = time.perf_counter()
        quotas.plan(counts_RE, 0)
        quotas.choose(ids_RTK[0])
        middle = time.perf_counter()
        slots_E[ids_RTK[0]]
        times_s["balanced"].append(middle - start)
        times_s["static"].append(time.perf_counter() - middle)
    plan = quotas.explain(counts_RE)
    assert plan.instances_I4 is not None, "nothing was balanced"
    layer_s = statistics.median(times_s["balanced"]) + Machine().all_gather_s(2)
    return {
        "num_ranks": 2,
        "batch": num_tokens,
        "plan_us": 1e6 * statistics.median(times_s["balanced"]),
        "static_us": 1e6 * statistics.median(times_s["static"]),
        "added_step_us": 1e6 * num_layers * layer_s,
        "cost_before_over_after": plan.static_cost / plan.cost,
    }
