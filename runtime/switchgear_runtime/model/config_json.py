"""Readers of config.json: one function per architecture, each turning Hugging Face's keys into a `DecoderSpec`.

Defaults are those of Transformers' config classes; sizes have none, since a checkpoint that leaves them out was
written by something we do not know. A key that would change the computation in a way we do not implement raises
CheckpointError. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.config_keys import Keys, read_json
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec, QKNorm
from switchgear_runtime.moe.spec import MoESpec, Scoring

LAYERS_MAX = 1024
EXPERTS_MAX = 1 << 14
_ARCHITECTURES = {
    "FlexOlmoForCausalLM": "flex_olmo",
    "GraniteMoeForCausalLM": "granitemoe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "PhiMoEForCausalLM": "phimoe",
    "PhimoeForCausalLM": "phimoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def _attention(
    keys: Keys,
    *,
    qk_norm: QKNorm | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    window: int | None = None,
    clip_qkv: float | None = None,
    scale: float | None = None,
) -> AttentionSpec:
    num_heads = keys.integer("num_attention_heads")
    num_kv_heads = keys.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise keys.fail("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    head_dim = keys.integer("head_dim", max(1, keys.integer("hidden_size") // num_heads))
    if head_dim % 2:
        raise keys.fail("head_dim", head_dim, "must be even: rotary positions turn pairs")
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
        scale=scale,
        sliding_window=window,
    )


def _experts(
    keys: Keys,
    *,
    ffn_key: str,
    renormalize: bool,
    scoring: Scoring = "softmax",
    jitter_eps: float = 0.0,
    shared_ffn: int = 0,
    shared_gate: bool = False,
) -> MoESpec:
    # Transformers 5 writes num_local_experts for some that say num_experts in their own files.
    counts = {
        key: keys.integer(key, high=EXPERTS_MAX)
        for key in ("num_experts", "num_local_experts")
        if keys.get(key) is not None
    }
    if not counts:
        raise CheckpointError(f"{keys.path}: num_experts is missing")
    if len(set(counts.values())) > 1:
        raise keys.fail(
            "num_local_experts", counts["num_local_experts"], f"differs from num_experts={counts['num_experts']}"
        )
    num_experts = next(iter(counts.values()))
    top_k = keys.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise keys.fail("num_experts_per_tok", top_k, f"is more than the {num_experts} experts")
    return MoESpec(
        num_experts=num_experts,
        top_k=top_k,
        ffn=keys.integer(ffn_key),
        scoring=scoring,
        jitter_eps=jitter_eps,
        renormalize=renormalize,
        shared_ffn=shared_ffn,
        shared_gate=shared_gate,
    )


def _num_layers(keys: Keys) -> int:
    return keys.integer("num_hidden_layers", high=LAYERS_MAX)


def _optional_window(keys: Keys) -> int | None:
    return keys.integer("sliding_window") if keys.get("sliding_window") is not None else None


def _sparse_or_dense(keys: Keys, experts: MoESpec) -> list[MoESpec | DenseSpec]:
    """Which layers have experts, by Qwen's two keys."""
    sparse_step = keys.integer("decoder_sparse_step", 1)
    mlp_only = keys.get("mlp_only_layers") or []
    if not isinstance(mlp_only, list) or not all(isinstance(index, int) for index in mlp_only):
        raise keys.fail("mlp_only_layers", mlp_only, "must be a list of layer indices")
    return [
        DenseSpec(ffn=keys.integer("intermediate_size"))
        if index in mlp_only or (index + 1) % sparse_step != 0
        else experts
        for index in range(_num_layers(keys))
    ]


def _decoder(
    keys: Keys, name: str, layers: Sequence[LayerSpec], *, theta: float, eps: float, positions: int, **fields: Any
) -> DecoderSpec:
    """What all architectures read alike; `fields`: what else this one sets."""
    keys.only("hidden_act", "silu")
    keys.only("partial_rotary_factor", 1.0)
    if not any(isinstance(layer.ffn, MoESpec) for layer in layers):
        raise CheckpointError(f"{keys.path}: no layer has experts (mlp_only_layers, decoder_sparse_step)")
    vocab_size = keys.integer("vocab_size")
    return DecoderSpec(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=keys.integer("hidden_size"),
        layers=tuple(layers),
        rope=keys.rope(theta),
        rms_norm_eps=keys.number("rms_norm_eps", eps),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        max_position_embeddings=keys.integer("max_position_embeddings", positions),
        eos_token_ids=_eos_token_ids(keys, vocab_size),
        dtype=keys.dtype(),
        quantization=keys.quantization(),
        **fields,
    )


def _eos_token_ids(keys: Keys, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json's wins, as in Transformers' generate()."""
    generation = keys.path.with_name("generation_config.json")
    for path, values in ((generation, read_json(generation) if generation.exists() else {}), (keys.path, keys.values)):
        value = values.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            for token_id in ids:
                if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                    raise CheckpointError(f"{path}: eos_token_id={value!r} must be a token id or a list of them")
            # An id beyond the vocabulary (tiny test models keep the big model's) can never be drawn.
            return tuple(sorted({token_id for token_id in ids if token_id < vocab_size}))
    return ()


def _qwen3_moe(keys: Keys) -> DecoderSpec:
    window = keys.integer("sliding_window", 4096) if keys.boolean("use_sliding_window", False) else None
    bias = keys.boolean("attention_bias", False)
    attention = _attention(keys, qk_norm="head", qkv_bias=bias, out_bias=bias, window=window)
    experts = _experts(keys, ffn_key="moe_intermediate_size", renormalize=keys.boolean("norm_topk_prob", False))
    layers = [LayerSpec(attention=attention, ffn=ffn) for ffn in _sparse_or_dense(keys, experts)]
    return _decoder(keys, "qwen3_moe", layers, theta=10_000.0, eps=1e-6, positions=32768)


def _qwen2_moe(keys: Keys) -> DecoderSpec:
    qkv_bias = keys.boolean("qkv_bias", True)
    experts = _experts(
        keys,
        ffn_key="moe_intermediate_size",
        renormalize=keys.boolean("norm_topk_prob", False),
        shared_ffn=keys.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = [
        LayerSpec(attention=_attention(keys, qkv_bias=qkv_bias, window=window), ffn=ffn)
        for window, ffn in zip(_qwen2_windows(keys), _sparse_or_dense(keys, experts), strict=True)
    ]
    return _decoder(keys, "qwen2_moe", layers, theta=10_000.0, eps=1e-6, positions=32768)


def _qwen2_windows(keys: Keys) -> list[int | None]:
    """By `layer_types`; without it, every second layer below max_window_layers slides (as Transformers has it)."""
    num_layers = _num_layers(keys)
    uses = keys.boolean("use_sliding_window", False)
    below = keys.integer("max_window_layers", 28, low=0)
    kinds = keys.get("layer_types")
    if kinds is None:
        slides = [uses and index % 2 == 0 and index < below for index in range(num_layers)]
    else:
        if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            raise keys.fail("layer_types", kinds, "must be a list of 'full_attention' and 'sliding_attention'")
        if len(kinds) != num_layers:
            raise keys.fail("layer_types", kinds, f"must have one entry for each of num_hidden_layers={num_layers}")
        slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) and not uses:
        raise keys.fail("layer_types", kinds, "has sliding layers, but use_sliding_window is not true")
    return [keys.integer("sliding_window", 4096) if slide else None for slide in slides]


def _mixtral(keys: Keys) -> DecoderSpec:
    keys.only("attention_bias", False)
    attention = _attention(keys, window=_optional_window(keys))
    experts = _experts(keys, ffn_key="intermediate_size", renormalize=True)
    layers = [LayerSpec(attention=attention, ffn=experts)] * _num_layers(keys)
    return _decoder(keys, "mixtral", layers, theta=1_000_000.0, eps=1e-5, positions=4096 * 32)


def _olmoe(keys: Keys) -> DecoderSpec:
    keys.only("sliding_window")
    bias = keys.boolean("attention_bias", False)
    clip_qkv = keys.number("clip_qkv", 1.0) if keys.get("clip_qkv") is not None else None
    attention = _attention(keys, qk_norm="projection", qkv_bias=bias, out_bias=bias, clip_qkv=clip_qkv)
    experts = _experts(keys, ffn_key="intermediate_size", renormalize=keys.boolean("norm_topk_prob", False))
    layers = [LayerSpec(attention=attention, ffn=experts)] * _num_layers(keys)
    return _decoder(keys, "olmoe", layers, theta=10_000.0, eps=1e-5, positions=4096)


def _flex_olmo(keys: Keys) -> DecoderSpec:
    keys.only("sliding_window")
    keys.only("clip_qkv")
    bias = keys.boolean("attention_bias", False)
    attention = _attention(keys, qk_norm="projection", qkv_bias=bias, out_bias=bias)
    experts = _experts(keys, ffn_key="intermediate_size", renormalize=keys.boolean("norm_topk_prob", False))
    layers = [LayerSpec(attention=attention, ffn=experts)] * _num_layers(keys)
    return _decoder(keys, "flex_olmo", layers, theta=500_000.0, eps=1e-6, positions=4096, norm_placement="post")


def _granitemoe(keys: Keys) -> DecoderSpec:
    keys.only("sliding_window")
    keys.only("shared_intermediate_size", 0)
    bias = keys.boolean("attention_bias", False)
    scale = keys.number("attention_multiplier", 1.0)
    attention = _attention(keys, qkv_bias=bias, out_bias=bias, scale=scale)
    # Its router takes the softmax of the chosen logits alone: the softmax of all, divided by the sum of the chosen.
    experts = _experts(keys, ffn_key="intermediate_size", renormalize=True)
    layers = [LayerSpec(attention=attention, ffn=experts)] * _num_layers(keys)
    return _decoder(
        keys,
        "granitemoe",
        layers,
        theta=10_000.0,
        eps=1e-6,
        positions=2048,
        embedding_multiplier=keys.number("embedding_multiplier", 1.0),
        residual_multiplier=keys.number("residual_multiplier", 1.0),
        logits_scaling=keys.number("logits_scaling", 1.0),
    )


def _phimoe(keys: Keys) -> DecoderSpec:
    keys.only("num_experts_per_tok", 2)  # whatever the key says, the sparse mixer takes two
    bias = keys.boolean("attention_bias", False)
    attention = _attention(keys, qkv_bias=bias, out_bias=bias, window=_optional_window(keys))
    experts = _experts(
        keys,
        ffn_key="intermediate_size",
        renormalize=False,
        scoring="sparsemixer",
        jitter_eps=keys.number("router_jitter_noise", 0.01),
    )
    layers = [LayerSpec(attention=attention, ffn=experts)] * _num_layers(keys)
    lm_head_bias = keys.boolean("lm_head_bias", False)
    return _decoder(
        keys,
        "phimoe",
        layers,
        theta=1_000_000.0,
        eps=1e-5,
        positions=4096 * 32,
        norm="layer",
        lm_head_bias=lm_head_bias,
    )


_READERS: dict[str, Callable[[Keys], DecoderSpec]] = {
    "flex_olmo": _flex_olmo,
    "granitemoe": _granitemoe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}


def read_spec(model_dir: Path) -> DecoderSpec:
    if not model_dir.is_dir():
        raise CheckpointError(f"model={str(model_dir)!r} is not a directory; give a Hugging Face checkpoint's folder")
    keys = Keys(model_dir / "config.json")
    model_type = keys.get("model_type")
    architectures = keys.get("architectures")
    if model_type is None and isinstance(architectures, list) and architectures:
        model_type = _ARCHITECTURES.get(str(architectures[0]), architectures[0])
    if model_type not in _READERS:
        raise keys.fail("model_type", model_type, f"is not supported; switchgear serves {', '.join(sorted(_READERS))}")
    return _READERS[cast(str, model_type)](keys)
