"""The oracle of the MoE layer: the same arithmetic in plain torch, slowly, with no slots, ranks or messages.

Where the fast path rounds, so does this: rows to the payload's dtype before and after the experts, activations to the
weights' dtype before each product. The sum over a token's K experts runs in fp32 in router order.

Letters: T tokens, D hidden, F ffn, K top-k, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear_runtime.moe.spec import MoESpec


class SharedWeights(NamedTuple):
    """The expert that every token takes, and the row its sigmoid gate is a product with."""

    w13_2FD: Tensor
    w2_DF: Tensor
    gate_1D: Tensor | None


def reference_route(x_TD: Tensor, router_weight_ED: Tensor, spec: MoESpec) -> tuple[Tensor, Tensor]:
    """(topk_weights_TK, topk_ids_TK), best first, ties to the lowest id."""
    logits_TE = x_TD.double() @ router_weight_ED.double().T
    if spec.scoring == "sparsemixer":
        return reference_sparsemixer(logits_TE, spec.top_k, spec.jitter_eps)
    scores_TE = logits_TE.softmax(-1) if spec.scoring == "softmax" else logits_TE.sigmoid()
    order_TE = torch.sort(scores_TE.float(), dim=-1, descending=True, stable=True).indices
    topk_ids_TK = order_TE[:, : spec.top_k]
    topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
    if spec.renormalize:
        topk_weights_TK = topk_weights_TK / topk_weights_TK.sum(-1, keepdim=True)
    return topk_weights_TK.float(), topk_ids_TK


def reference_sparsemixer(logits_TE: Tensor, top_k: int, jitter_eps: float) -> tuple[Tensor, Tensor]:
    """Again and again the best of the experts left, weighed by a softmax over those of them that are near it.

    Nearness is decided in fp32, as in Transformers: an expert at the very limit must not depend on the precision.
    """
    weights_TK = torch.zeros((logits_TE.shape[0], top_k))
    topk_ids_TK = torch.zeros((logits_TE.shape[0], top_k), dtype=torch.int64)
    for token, logits_E in enumerate(logits_TE.float()):
        left = list(range(len(logits_E)))
        for k in range(top_k):
            best = max(left, key=lambda expert: (float(logits_E[expert]), -expert))
            total = 0.0
            for expert in left:
                gap = logits_E[best] - logits_E[expert]
                if not gap / max(logits_E[expert].abs(), logits_E[best]) > 2 * jitter_eps:  # 0 / 0 is near
                    total += math.exp(-gap)
            weights_TK[token, k], topk_ids_TK[token, k] = 1.0 / total, best
            left.remove(best)
    return weights_TK, topk_ids_TK


def reference_mlp(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    dtype = w13_2FD.dtype
    gate_TF, up_TF = (x_TD.to(dtype).double() @ w13_2FD.double().T).float().double().chunk(2, -1)
    hidden_TF = (gate_TF * gate_TF.sigmoid() * up_TF).float().to(dtype)
    return (hidden_TF.double() @ w2_DF.double().T).float()


def reference_expert(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """reference_mlp, rounded as the wire rounds it."""
    return reference_mlp(x_TD, w13_2FD, w2_DF).to(w13_2FD.dtype).float()


def reference_shared(x_TD: Tensor, shared: SharedWeights) -> Tensor:
    y_TD = reference_mlp(x_TD, shared.w13_2FD, shared.w2_DF)
    if shared.gate_1D is None:
        return y_TD
    return ((x_TD.double() @ shared.gate_1D.double().T).sigmoid() * y_TD.double()).float()


def reference_moe(
    x_TD: Tensor,
    router_weight_ED: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    spec: MoESpec,
    shared: SharedWeights | None = None,
) -> Tensor:
    """y_TD of one layer, token by token."""
    topk_weights_TK, topk_ids_TK = reference_route(x_TD, router_weight_ED, spec)
    y_TD = torch.zeros_like(x_TD)
    for token in range(x_TD.shape[0]):
        for k in range(spec.top_k):
            expert = int(topk_ids_TK[token, k])
            row_1D = reference_expert(x_TD[token : token + 1], w13_E2FD[expert], w2_EDF[expert])
            y_TD[token] += topk_weights_TK[token, k] * row_1D[0]
    return y_TD if shared is None else y_TD + reference_shared(x_TD, shared)
