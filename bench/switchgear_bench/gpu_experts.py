"""Subjects of `bench gpu`: the grouped ffn of the experts that a batch chose, beside torch's grouped product.

Letters as in gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from switchgear_bench.gpu import Shape, Subject, draw_ids, silu_mul
from switchgear_runtime.cuda.kernels import Grouping, Kernels

_TOLERANCE = 3e-2  # of bf16 rows


def experts(kernels: Kernels, shape: Shape, nums_tokens: Sequence[int]) -> Iterator[Subject]:
    """One set of weights for all numbers of tokens, freed with the last."""
    device = kernels.device
    w13 = _random(shape.num_experts, 2 * shape.ffn, shape.hidden, device=device)
    w2 = _random(shape.num_experts, shape.hidden, shape.ffn, device=device)
    addresses = [torch.tensor([w.data_ptr() for w in weights], dtype=torch.int64).to(device) for weights in (w13, w2)]
    for num_tokens in nums_tokens:
        yield _subject(kernels, shape, num_tokens, w13, w2, *addresses)


def _random(num_experts: int, num_out: int, num_k: int, *, device: torch.device) -> Tensor:
    """Expert by expert: fp32 of all at once would not fit."""
    weights = torch.empty(num_experts, num_out, num_k, dtype=torch.bfloat16, device=device)
    for expert in weights:
        expert.normal_(std=num_k**-0.5)
    return weights


def _subject(
    kernels: Kernels, shape: Shape, num_tokens: int, w13: Tensor, w2: Tensor, w13_S: Tensor, w2_S: Tensor
) -> Subject:
    device = kernels.device
    ids_TK = draw_ids(shape, num_tokens, device)
    x_TD = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
    plan = kernels.plan_dispatch(ids_TK, 1, shape.num_experts)
    num_pairs = num_tokens * shape.top_k
    order_N = torch.sort(ids_TK.view(-1), stable=True).indices
    token_of_N = order_N // shape.top_k
    counts_E = torch.bincount(ids_TK.view(-1).long(), minlength=shape.num_experts)
    ends_E = counts_E.cumsum(0).int()
    num_touched = int((counts_E > 0).sum())

    def group() -> Grouping:
        return kernels.group(plan.pairs_N2, plan.rows_begin_R1, plan.pairs_begin_R1, 0, shape.num_experts)

    def ours() -> Tensor:
        groups = group()
        act_NF = kernels.expert_gated_linear(x_TD, w13_S, shape.ffn, groups)
        return kernels.expert_linear(act_NF, w2_S, shape.hidden, groups)

    def baseline() -> Tensor:
        """As Transformers' grouped_mm experts: rows in expert order, two grouped products, rows back."""
        x_ND = x_TD.index_select(0, token_of_N)
        act_NF = silu_mul(_grouped(x_ND, w13, ends_E))
        y_ND = _grouped(act_NF, w2, ends_E)
        return torch.empty_like(y_ND).index_copy_(0, order_N, y_ND)

    def check() -> None:
        assert int(group().begin_S1[-1]) == num_pairs, "pairs are missing"
        mine, theirs = ours().float(), baseline().float()
        assert float(theirs.abs().max()) > 0.1, "the product is empty"
        assert float((mine - theirs).abs().max()) < _TOLERANCE * float(theirs.abs().max())

    weight_bytes = num_touched * 3 * shape.hidden * shape.ffn * 2
    return Subject(
        kernel="experts",
        shape=shape.name,
        num_tokens=num_tokens,
        num_bytes=weight_bytes + num_tokens * shape.hidden * 2 + num_pairs * shape.hidden * 2,
        flops=num_pairs * 6 * shape.hidden * shape.ffn,
        ours=ours,
        baseline=baseline,
        baseline_name="torch grouped_mm" if device.type == "cuda" else "torch, expert by expert",
        check=check,
    )


def _grouped(x_NK: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    if x_NK.device.type == "cuda":
        return torch._grouped_mm(x_NK, weights.transpose(-2, -1), offs=ends_E)
    parts, begin = [], 0
    for weight, end in zip(weights, ends_E.tolist(), strict=True):
        parts.append(x_NK[begin:end] @ weight.T)
        begin = end
    return torch.cat(parts)
