"""Tensor names on disk: a table per layout of checkpoint, and the shapes a `DecoderSpec` expects under them.

Experts lie either one by one (hub checkpoints, and what Transformers' `save_pretrained` writes) or fused over all
experts of a layer (Transformers' in-memory form). Imports no torch.

Letters: D hidden, F ffn, E logical experts, H query heads, G kv heads, C head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, MoESpec, NormPlacement

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"
SHARED_EXPERT = "mlp.shared_expert"
SHARED_GATE = "mlp.shared_expert_gate.weight"
SCALES = "_scale_inv"  # behind an fp8 weight's name
Shapes = dict[str, tuple[int, ...]]


def scales_name(weight: str) -> str:
    """Of an fp8 weight's scales."""
    return weight + SCALES


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """How the tensors of a MoE block are named, under `model.layers.{layer}.`."""

    gate: str  # {expert} stands for the expert's index, if it has a tensor of its own
    up: str
    down: str
    router_weight: str = "mlp.gate.weight"
    fused: bool = False  # gate and up in one tensor [E, 2F, D], gate rows first; down [E, D, F]

    def router(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.router_weight}"

    def expert(self, layer: int, expert: int) -> tuple[str, str, str]:
        """(gate, up, down); for the fused layout gate and up are the same tensor."""
        prefix = f"model.layers.{layer}."
        return (
            prefix + self.gate.format(expert=expert),
            prefix + self.up.format(expert=expert),
            prefix + self.down.format(expert=expert),
        )


def _one_by_one(folder: str, gate: str, up: str, down: str, *, router: str) -> ExpertNames:
    each = folder + ".{expert}."
    return ExpertNames(gate=each + gate, up=each + up, down=each + down, router_weight=router)


def _fused(gate_up: str, down: str, *, router: str) -> ExpertNames:
    return ExpertNames(gate=gate_up, up=gate_up, down=down, router_weight=router, fused=True)


_PROJECTIONS = _one_by_one(
    "mlp.experts", "gate_proj.weight", "up_proj.weight", "down_proj.weight", router="mlp.gate.weight"
)
_W123 = _one_by_one(
    "block_sparse_moe.experts", "w1.weight", "w3.weight", "w2.weight", router="block_sparse_moe.gate.weight"
)
_INPUT_OUTPUT = _fused(
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
    router="block_sparse_moe.router.layer.weight",
)
_FUSED = _fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", router="mlp.gate.weight")
_FUSED_PHI = _fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", router="mlp.router.weight")
_FUSED_GRANITE = _fused(
    "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.experts.down_proj",
    router="block_sparse_moe.router.weight",
)
LAYOUTS = {  # by model_type: what the hub has, then what Transformers has in memory
    "flex_olmo": (_PROJECTIONS, _FUSED),
    "granitemoe": (_INPUT_OUTPUT, _FUSED_GRANITE),
    "mixtral": (_W123, _FUSED),
    "olmoe": (_PROJECTIONS, _FUSED),
    "phimoe": (_W123, _FUSED_PHI),
    "qwen2_moe": (_PROJECTIONS, _FUSED),
    "qwen3_moe": (_PROJECTIONS, _FUSED),
}
# The norms of attention and of the ffn, by where they stand.
LAYER_NORMS: dict[NormPlacement, tuple[str, str]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def expert_names(spec: DecoderSpec, present: Container[str]) -> ExpertNames:
    """The layout this checkpoint uses; the usual one if none fits, so that the error names the usual tensor."""
    layouts = LAYOUTS[spec.architecture]
    for names in layouts:
        if names.expert(spec.moe_layers[0], 0)[0] in present:
            return names
    return layouts[0]


def attention_shapes(attention: AttentionSpec, hidden: int, layer: int) -> Shapes:
    prefix = f"model.layers.{layer}.self_attn."
    q_rows = attention.num_heads * attention.head_dim
    kv_rows = attention.num_kv_heads * attention.head_dim
    rows = {
        "q_proj": (q_rows, hidden),
        "k_proj": (kv_rows, hidden),
        "v_proj": (kv_rows, hidden),
        "o_proj": (hidden, q_rows),
    }
    shapes: Shapes = {f"{prefix}{name}.weight": shape for name, shape in rows.items()}
    has_bias = {name: attention.out_bias if name == "o_proj" else attention.qkv_bias for name in rows}
    shapes.update({f"{prefix}{name}.bias": (shape[0],) for name, shape in rows.items() if has_bias[name]})
    if attention.qk_norm == "head":
        shapes.update({f"{prefix}{name}.weight": (attention.head_dim,) for name in ("q_norm", "k_norm")})
    elif attention.qk_norm == "projection":
        shapes.update({f"{prefix}q_norm.weight": (q_rows,), f"{prefix}k_norm.weight": (kv_rows,)})
    return shapes


def norm_shapes(spec: DecoderSpec, name: str) -> Shapes:
    tensors = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{tensor}": (spec.hidden_size,) for tensor in tensors}


def mlp_shapes(name: str, ffn: int, hidden: int) -> Shapes:
    rows = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return {f"{name}.{projection}.weight": shape for projection, shape in rows.items()}


def expert_shapes(names: ExpertNames, moe: MoESpec, hidden: int, layer: int) -> Shapes:
    if names.fused:
        gate, _, down = names.expert(layer, 0)
        return {gate: (moe.num_experts, 2 * moe.ffn, hidden), down: (moe.num_experts, hidden, moe.ffn)}
    shapes: Shapes = {}
    for expert in range(moe.num_experts):
        gate, up, down = names.expert(layer, expert)
        shapes |= {gate: (moe.ffn, hidden), up: (moe.ffn, hidden), down: (hidden, moe.ffn)}
    return shapes


def expected_shapes(spec: DecoderSpec, names: ExpertNames, present: Container[str]) -> Shapes:
    """Every tensor the model needs. A tied model may still carry an lm_head, which then counts (as in Transformers)."""
    hidden = spec.hidden_size
    shapes: Shapes = {EMBED: (spec.vocab_size, hidden), **norm_shapes(spec, FINAL_NORM)}
    if not spec.tie_word_embeddings or LM_HEAD in present:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    if spec.lm_head_bias:
        shapes[LM_HEAD_BIAS] = (spec.vocab_size,)
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}."
        for norm in LAYER_NORMS[spec.norm_placement]:
            shapes |= norm_shapes(spec, prefix + norm)
        shapes |= attention_shapes(layer.attention, hidden, index)
        if isinstance(layer.ffn, MoESpec):
            shapes[names.router(index)] = (layer.ffn.num_experts, hidden)
            shapes |= expert_shapes(names, layer.ffn, hidden, index)
            if layer.ffn.shared_ffn:
                shapes |= mlp_shapes(prefix + SHARED_EXPERT, layer.ffn.shared_ffn, hidden)
            if layer.ffn.shared_gate:
                shapes[prefix + SHARED_GATE] = (1, hidden)
        else:
            shapes |= mlp_shapes(prefix + "mlp", layer.ffn.ffn, hidden)
    return shapes
