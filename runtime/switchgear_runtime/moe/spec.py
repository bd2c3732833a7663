"""What one mixture-of-experts layer computes: `MoESpec`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """A router over `num_experts` logical experts, of which each token takes `top_k`.

    The fields below `renormalize` have one value today. They are here so that the models that need them (shared experts,
    sigmoid scores with a selection bias, group-limited routing) become a line in `model/spec.py` and a kernel, not a new shape.
    """

    num_experts: int
    top_k: int
    ffn: int  # width of one expert
    scoring: Scoring = "softmax"
    renormalize: bool = True  # divide the chosen scores by their sum
    score_bias: bool = False  # a bias that takes part in the choice, not in the weight
    num_groups: int = 1
    top_k_groups: int = 1
    shared_ffn: int = 0  # width of the expert that every token takes; 0: none
    routed_scale: float = 1.0
