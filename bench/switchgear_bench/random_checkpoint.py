"""A model of a given shape with random weights, made where they are wanted: `RandomCheckpoint`, in a Checkpoint's place.

Nothing is read and nothing is kept: a 60 GB model is there as soon as its device has drawn it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.model.names import LM_HEAD, expected_shapes, expert_names
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, LayerSpec, MoESpec, RopeSpec

_WEIGHT = 0.5  # standard deviation of a product of normed rows with a matrix


def qwen3_30b_a3b() -> DecoderSpec:
    return _qwen3(layers=48, hidden=2048, heads=32, kv_heads=4, head=128, experts=128, top_k=8, ffn=768, vocab=151936)


def tiny() -> DecoderSpec:
    return _qwen3(layers=2, hidden=64, heads=4, kv_heads=2, head=16, experts=8, top_k=2, ffn=32, vocab=128)


def _qwen3(
    *, layers: int, hidden: int, heads: int, kv_heads: int, head: int, experts: int, top_k: int, ffn: int, vocab: int
) -> DecoderSpec:
    layer = LayerSpec(
        attention=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head, qk_norm="head"),
        ffn=MoESpec(num_experts=experts, top_k=top_k, ffn=ffn),
    )
    return DecoderSpec(
        architecture="qwen3_moe",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(layer,) * layers,
        rope=RopeSpec(theta=1e6),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        eos_token_ids=(0,),
        dtype="bfloat16",
    )


class RandomCheckpoint:
    """bf16 on `device`; a norm's weights are ones, so that activations keep their size."""

    model_dir = "random weights"
    lm_head = LM_HEAD

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self.spec = spec
        self.names: Any = expert_names(spec, ())
        self._shapes = expected_shapes(spec, self.names, ())
        self._device = device

    def dtype(self, _requested: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        return self._draw(self._shapes[name])

    def expert_gate_up(self, _layer: int, _expert: int) -> Tensor:
        return self._draw((2 * self.spec.moe.ffn, self.spec.hidden_size))

    def expert_down(self, _layer: int, _expert: int) -> Tensor:
        return self._draw((self.spec.hidden_size, self.spec.moe.ffn))

    def identity(self) -> str:
        return "random"

    def release(self) -> None:
        """Nothing is mapped."""

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._device)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return weight.normal_(std=_WEIGHT * shape[-1] ** -0.5)
