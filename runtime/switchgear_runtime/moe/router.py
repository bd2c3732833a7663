"""The model's gate: `TopKRouter`, fp32 weights on unrounded fp32 activations, ties to the lowest expert id.

Letters: T tokens, D hidden, K top-k, E logical experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.moe.spec import MoESpec


class TopKRouter:
    """x_TD -> (topk_weights_TK fp32, topk_ids_TK int32), best first."""

    def __init__(self, weight: ops.PackedWeight, spec: MoESpec) -> None:
        """`weight`: [E, D], packed as f32."""
        self.spec = spec
        self.weight = weight

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = ops.linear(x_TD, self.weight)
        if self.spec.scoring == "sparsemixer":
            return sparsemixer(logits_TE, self.spec.top_k, self.spec.jitter_eps)
        return ops.topk_router(logits_TE, self.spec.top_k, self.spec.scoring, self.spec.renormalize)


def sparsemixer(logits_TE: Tensor, top_k: int, jitter_eps: float) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 (Liu et al., "GRIN", 2024) at inference: the best expert, then the best of the others, and so on.

    Each one's weight is its share of a softmax over the experts still there whose logit is near its own: no further
    below than 2 * jitter_eps of the larger of the two magnitudes. The masks are exact elementwise arithmetic and
    comparisons, the softmax is the native op's: row independent, as everything is.
    """
    remaining_TE = logits_TE.clone()
    weights, ids = [], []
    for _ in range(top_k):
        best_T1 = remaining_TE.amax(-1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * jitter_eps
        near_TE = remaining_TE.masked_fill(far_TE, float("-inf"))
        weights_T1, ids_T1 = ops.topk_router(near_TE, 1, "softmax", False)
        remaining_TE.scatter_(1, ids_T1.long(), float("-inf"))
        weights.append(weights_T1)
        ids.append(ids_T1)
    return torch.cat(weights, -1), torch.cat(ids, -1)
