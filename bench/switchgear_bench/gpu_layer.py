"""One layer of experts as `bench gpu` times it: its `Shape`, its random `Layer` of weights, and `Routing`s of its tokens.

A cell of few tokens cycles through several routings: the next call's experts are then other ones, as the next layer's would
be, and lie in no cache. Letters: T tokens, D hidden, F ffn, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MANY_TOKENS = 64
_CYCLE, _CYCLE_OF_MANY = 8, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer of experts."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    ffn: int


QWEN3 = Shape("Qwen3-30B-A3B", 128, 8, 2048, 768)
DEEPSEEK = Shape("DeepSeek-V3", 256, 8, 7168, 2048)
TINY = Shape("tiny", 8, 2, 128, 32)
UNIFORM, ZIPF = "uniform", "zipf"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """bf16 weights, laid out as checkpoints and Transformers have them: gates, then ups."""

    shape: Shape
    w13_EXD: Tensor  # [E, 2F, D]
    w2_EDF: Tensor
    router_ED: Tensor  # fp32, of values that bf16 has

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> Layer:
        router_ED = torch.randn(shape.num_experts, shape.hidden, device=device) * shape.hidden**-0.5
        return cls(
            shape=shape,
            w13_EXD=_random(shape.num_experts, 2 * shape.ffn, shape.hidden, device=device),
            w2_EDF=_random(shape.num_experts, shape.hidden, shape.ffn, device=device),
            router_ED=router_ED.bfloat16().float(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Tokens and what a router chose for them."""

    h_TD: Tensor  # fp32, of values that bf16 has: what the router reads
    x_TD: Tensor  # the same, bf16
    ids_TK: Tensor  # int32
    weights_TK: Tensor

    @classmethod
    def draw(cls, shape: Shape, num_tokens: int, skew: str, seed: int, device: torch.device) -> Routing:
        generator = torch.Generator().manual_seed(seed)
        ids_TK = draw_ids(shape, num_tokens, skew, generator)
        weights_TK = torch.rand(num_tokens, shape.top_k, generator=generator) + 0.1
        x_TD = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return cls(h_TD=x_TD.float(), x_TD=x_TD, ids_TK=ids_TK.to(device), weights_TK=weights_TK.to(device))

    def num_touched(self) -> int:
        return len(set(self.ids_TK.view(-1).tolist()))


def routings(shape: Shape, num_tokens: int, skew: str, device: torch.device) -> list[Routing]:
    """Those of one cell; of one size and skew always the same choices."""
    cycle = _CYCLE if num_tokens <= _MANY_TOKENS else _CYCLE_OF_MANY
    return [Routing.draw(shape, num_tokens, skew, 1000 * num_tokens + number, device) for number in range(cycle)]


def draw_ids(shape: Shape, num_tokens: int, skew: str, generator: torch.Generator) -> Tensor:
    """int32 [T, K], different experts for each token: all alike, or the r-th most wanted in proportion to 1 / r."""
    if skew == ZIPF:
        ranks_E = torch.randperm(shape.num_experts, generator=generator) + 1
        wanted_E = -ranks_E.float().log()
    else:
        wanted_E = torch.zeros(shape.num_experts)
    noise_TE = -torch.rand(num_tokens, shape.num_experts, generator=generator).clamp_min(1e-20).log()
    return (wanted_E - noise_TE.log()).topk(shape.top_k, -1).indices.int()  # Gumbel noise: drawn without replacement


def _random(num_experts: int, num_out: int, num_k: int, *, device: torch.device) -> Tensor:
    """Expert by expert: fp32 of all at once would not fit."""
    weights = torch.empty(num_experts, num_out, num_k, dtype=torch.bfloat16, device=device)
    for expert in weights:
        expert.normal_(std=num_k**-0.5)
    return weights
