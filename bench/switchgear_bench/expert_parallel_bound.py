"""The most that two ranks can reach of one rank's speed: by the bytes a decode step reads, by the FLOPs of the slower rank in prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchgear_bench.serve_bound import Model, distinct_experts_uniform
from switchgear_bench.serve_cases import Case

NUM_RANKS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """`one_rank` and `by_rank`: bytes a step (`by` is "bytes") or FLOPs of the whole prefill ("flops").

    Two ranks may also find the dense weights in the cache that they share, where one of them has just read them: then
    `ratio_if_dense_is_shared` is the bound.
    """

    by: str
    ratio: float
    ratio_if_dense_is_shared: float
    one_rank: float
    by_rank: list[float]
    distinct_experts: float | None = None


def decode_bound(case: Case, model: Model, tensor_bytes: Mapping[str, float]) -> Bound:
    """The ranks share the memory's bandwidth, so their bytes add up. Experts are as many as under uniform routing."""
    weights = model.weights
    distinct = distinct_experts_uniform(weights.num_experts, weights.top_k, case.batch_size)
    one = model.work(case, tensor_bytes, distinct).bytes_touched
    rest = one - tensor_bytes["dense"]  # each rank has its half of the experts, and the caches of its sequences
    by_rank = [tensor_bytes["dense"] + rest / NUM_RANKS] * NUM_RANKS
    return Bound(
        by="bytes",
        ratio=one / sum(by_rank),
        ratio_if_dense_is_shared=1.0,
        one_rank=one,
        by_rank=by_rank,
        distinct_experts=distinct,
    )


def prefill_bound(case: Case, model: Model, rows_RLE: Sequence[Sequence[Sequence[int]]]) -> Bound:
    """In each layer all ranks wait for the one with the most expert rows; the other work is even."""
    num_tokens = case.batch_size * case.prompt_tokens
    weights, num_layers = model.weights, model.spec.num_moe_layers
    row_flops = 2.0 * weights.experts / 2 / weights.num_experts / num_layers  # 2 bytes a weight
    total = case.batch_size * model.prefill_flops(case.prompt_tokens)
    even = total - num_tokens * weights.top_k * num_layers * row_flops
    rows_RL = [[sum(experts) for experts in layers] for layers in rows_RLE]
    slowest = sum(max(rows) for rows in zip(*rows_RL, strict=True)) * row_flops
    by_rank = [even / NUM_RANKS + sum(rows) * row_flops for rows in rows_RL]
    ratio = total / (even / NUM_RANKS + slowest)
    return Bound(by="flops", ratio=ratio, ratio_if_dense_is_shared=ratio, one_rank=total, by_rank=by_rank)
