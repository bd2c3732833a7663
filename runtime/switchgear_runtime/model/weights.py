"""Builds a `Decoder` from a checkpoint: the dense weights, which every rank has; experts come later, by epoch.

Matrices take the run's dtype; norms, biases and the router keep fp32, which holds whatever is on disk exactly.
"""

from __future__ import annotations

import torch

from switchgear_runtime.model.attention import Attention
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Branch, Decoder, DecoderLayer, FeedForward
from switchgear_runtime.model.layers import DenseMLP, LayerNorm, Linear, Norm, RMSNorm, Rope, SharedExpert
from switchgear_runtime.model.names import EMBED, FINAL_NORM, LAYER_NORMS, LM_HEAD_BIAS, SHARED_EXPERT, SHARED_GATE
from switchgear_runtime.model.spec import AttentionSpec, MoESpec
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.moe.router import TopKRouter


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, *, num_positions: int, load: ExpertLoad) -> Decoder:
    """Every weight but the experts'. `num_positions`: the length of the rotary tables."""
    spec = checkpoint.spec
    ropes: dict[int, Rope] = {}  # by head size; one table for all layers
    layers: list[DecoderLayer] = []
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}."
        head_dim = layer.attention.head_dim
        if head_dim not in ropes:
            ropes[head_dim] = Rope(spec.rope, head_dim, num_positions)
        attention = _load_attention(checkpoint, layer.attention, prefix + "self_attn.", ropes[head_dim], dtype)
        ffn: FeedForward
        if isinstance(layer.ffn, MoESpec):
            router = TopKRouter(checkpoint.tensor(checkpoint.names.router(index)), layer.ffn)
            shared = _load_shared_expert(checkpoint, layer.ffn, prefix, dtype)
            ffn = MoELayer(spec.moe_layers.index(index), router, load, shared)
        else:
            ffn = _load_mlp(checkpoint, prefix + "mlp", dtype)
        attention_branch, ffn_branch = (
            Branch(
                norm=_load_norm(checkpoint, prefix + name),
                placement=spec.norm_placement,
                multiplier=spec.residual_multiplier,
            )
            for name in LAYER_NORMS[spec.norm_placement]
        )
        layers.append(DecoderLayer(attention_branch, attention, ffn_branch, ffn))
    embedding_VD = checkpoint.tensor(EMBED).to(dtype, copy=True).contiguous()
    lm_head_biases = [checkpoint.tensor(LM_HEAD_BIAS)] if spec.lm_head_bias else []
    return Decoder(
        embedding_VD,
        layers,
        _load_norm(checkpoint, FINAL_NORM),
        Linear([checkpoint.tensor(checkpoint.lm_head)], dtype, lm_head_biases),
        embedding_multiplier=spec.embedding_multiplier,
        logits_scaling=spec.logits_scaling,
    )


def _load_norm(checkpoint: Checkpoint, name: str) -> Norm:
    eps, weight_D = checkpoint.spec.rms_norm_eps, checkpoint.tensor(f"{name}.weight")
    if checkpoint.spec.norm == "layer":
        return LayerNorm(weight_D, checkpoint.tensor(f"{name}.bias"), eps)
    return RMSNorm(weight_D, eps)


def _load_mlp(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> DenseMLP:
    gate, up, down = (checkpoint.tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
    return DenseMLP(gate, up, down, dtype)


def _load_shared_expert(checkpoint: Checkpoint, spec: MoESpec, prefix: str, dtype: torch.dtype) -> SharedExpert | None:
    if not spec.shared_ffn:
        return None
    gate_1D = checkpoint.tensor(prefix + SHARED_GATE) if spec.shared_gate else None
    return SharedExpert(_load_mlp(checkpoint, prefix + SHARED_EXPERT, dtype), gate_1D)


def _load_attention(
    checkpoint: Checkpoint, spec: AttentionSpec, prefix: str, rope: Rope, dtype: torch.dtype
) -> Attention:
    def linear(has_bias: bool, *names: str) -> Linear:
        weights = [checkpoint.tensor(f"{prefix}{name}_proj.weight") for name in names]
        biases = [checkpoint.tensor(f"{prefix}{name}_proj.bias") for name in names] if has_bias else []
        return Linear(weights, dtype, biases)

    def norm(name: str) -> RMSNorm | None:
        if spec.qk_norm is None:
            return None
        return RMSNorm(checkpoint.tensor(f"{prefix}{name}_norm.weight"), checkpoint.spec.rms_norm_eps)

    return Attention(spec, linear(spec.qkv_bias, "q", "k", "v"), linear(spec.out_bias, "o"), rope, norm("q"), norm("k"))
