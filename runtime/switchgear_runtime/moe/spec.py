"""What one mixture-of-experts layer computes: `MoESpec`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid", "sparsemixer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """A router over `num_experts` logical experts, of which each token takes `top_k`.

    score_bias, the groups and routed_scale have one value today. They are here so that the models that need them
    (sigmoid scores with a selection bias, group-limited routing) become a line in a reader and a kernel, not a new
    shape.
    """

    num_experts: int
    top_k: int
    ffn: int  # width of one expert
    scoring: Scoring = "softmax"  # "sparsemixer": one by one, each weighed against the near ones (moe/router.py)
    jitter_eps: float = 0.0  # sparsemixer: an expert counts as near within twice this, relative
    renormalize: bool = True  # divide the chosen scores by their sum
    score_bias: bool = False  # a bias that takes part in the choice, not in the weight
    num_groups: int = 1
    top_k_groups: int = 1
    shared_ffn: int = 0  # width of the expert that every token takes, where the token is; 0: none
    shared_gate: bool = False  # that expert's row is multiplied by a sigmoid of its own
    routed_scale: float = 1.0
