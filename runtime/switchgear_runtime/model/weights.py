"""Builds a `Decoder` from a weight store: the dense weights, which every rank has; experts come later, by epoch.

Matrices take the run's dtype; norms, biases and the router keep fp32, which holds whatever is on disk exactly.
"""

from __future__ import annotations

import torch

from switchgear_runtime.model.attention import Attention
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.decoder import Branch, Decoder, DecoderLayer, FeedForward
from switchgear_runtime.model.layers import DenseMLP, LayerNorm, Linear, Norm, RMSNorm, Rope, SharedExpert
from switchgear_runtime.model.names import FINAL_NORM, LAYER_NORMS, LM_HEAD_BIAS
from switchgear_runtime.model.spec import AttentionSpec, MoESpec
from switchgear_runtime.model.weight_store import WeightStore
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.load import ExpertLoad
from switchgear_runtime.moe.router import TopKRouter


def load_decoder(store: WeightStore, *, num_positions: int, load: ExpertLoad) -> Decoder:
    """Every weight but the routed experts'. `num_positions`: the length of the rotary tables."""
    checkpoint, spec = store.checkpoint, store.checkpoint.spec
    ropes: dict[int, Rope] = {}  # by head size; one table for all layers
    layers: list[DecoderLayer] = []
    for index, layer in enumerate(spec.layers):
        prefix, name = f"model.layers.{index}.", f"layers.{index}."
        head_dim = layer.attention.head_dim
        if head_dim not in ropes:
            ropes[head_dim] = Rope(spec.rope, head_dim, num_positions)
        attention = _load_attention(store, layer.attention, index, ropes[head_dim])
        ffn: FeedForward
        if isinstance(layer.ffn, MoESpec):
            router = TopKRouter(store.matrix(f"{name}router"), layer.ffn)
            shared = _load_shared_expert(store, layer.ffn, name)
            moe_index = spec.moe_layers.index(index)
            ffn = MoELayer(moe_index, router, load, shared, expert_format=store.expert_format)
        else:
            ffn = DenseMLP(store.matrix(f"{name}gate_up"), store.matrix(f"{name}down"))
        attention_branch, ffn_branch = (
            Branch(
                norm=_load_norm(checkpoint, prefix + norm),
                placement=spec.norm_placement,
                multiplier=spec.residual_multiplier,
            )
            for norm in LAYER_NORMS[spec.norm_placement]
        )
        layers.append(DecoderLayer(attention_branch, attention, ffn_branch, ffn))
    lm_head_bias_V = checkpoint.tensor(LM_HEAD_BIAS).float().clone() if spec.lm_head_bias else None
    return Decoder(
        store.embedding(),
        layers,
        _load_norm(checkpoint, FINAL_NORM),
        Linear(store.matrix("lm_head", lm_head_bias_V)),
        embedding_multiplier=spec.embedding_multiplier,
        logits_scaling=spec.logits_scaling,
    )


def _load_norm(checkpoint: Checkpoint, name: str) -> Norm:
    eps, weight_D = checkpoint.spec.rms_norm_eps, checkpoint.tensor(f"{name}.weight")
    if checkpoint.spec.norm == "layer":
        return LayerNorm(weight_D, checkpoint.tensor(f"{name}.bias"), eps)
    return RMSNorm(weight_D, eps)


def _load_shared_expert(store: WeightStore, spec: MoESpec, name: str) -> SharedExpert | None:
    if not spec.shared_ffn:
        return None
    gate = Linear(store.matrix(f"{name}shared.gate")) if spec.shared_gate else None
    return SharedExpert(DenseMLP(store.matrix(f"{name}shared.gate_up"), store.matrix(f"{name}shared.down")), gate)


def _load_attention(store: WeightStore, spec: AttentionSpec, index: int, rope: Rope) -> Attention:
    checkpoint, prefix = store.checkpoint, f"model.layers.{index}.self_attn."

    def linear(matrix: str, has_bias: bool, *names: str) -> Linear:
        biases = [checkpoint.tensor(f"{prefix}{name}_proj.bias").float() for name in names] if has_bias else []
        return Linear(store.matrix(f"layers.{index}.{matrix}", torch.cat(biases) if biases else None))

    def norm(name: str) -> RMSNorm | None:
        if spec.qk_norm is None:
            return None
        return RMSNorm(checkpoint.tensor(f"{prefix}{name}_norm.weight"), checkpoint.spec.rms_norm_eps)

    qkv, out = linear("qkv", spec.qkv_bias, "q", "k", "v"), linear("out", spec.out_bias, "o")
    return Attention(spec, qkv, out, rope, norm("q"), norm("k"))
