"""Readers of config.json: one function per architecture, each turning Hugging Face's keys into a `DecoderSpec`.

Defaults are those of Transformers' config classes; sizes have none, since a checkpoint that leaves them out was written by
something we do not know. A key that would change the computation in a way we do not implement raises CheckpointError.
Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.spec import AttentionSpec, DecoderSpec, DenseSpec, Dtype, LayerSpec, RopeSpec
from switchgear_runtime.moe.spec import MoESpec

JSON_BYTES_MAX = 64 << 20
LAYERS_MAX = 1024
EXPERTS_MAX = 1 << 14
SIZE_MAX = 1 << 24  # any other dimension
_ARCHITECTURES = {"Qwen3MoeForCausalLM": "qwen3_moe", "MixtralForCausalLM": "mixtral"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that names the file."""
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise CheckpointError(f"{path} is over {JSON_BYTES_MAX} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


class _Keys:
    """The keys of one config.json, each read with its type and range checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def fail(self, key: str, value: object, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key}={value!r} {why}")

    def get(self, key: str) -> Any:
        """None when the key is absent or null."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = SIZE_MAX) -> int:
        value = self.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path}: {key} is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, value, f"must be an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float) -> float:
        return self.positive(key, self.get(key), default)

    def positive(self, key: str, value: object, default: float) -> float:
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.fail(key, value, "must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "must be true or false")
        return value

    def only(self, key: str, *accepted: object) -> None:
        """Refuse a key whose other values change the computation."""
        value = self.get(key)
        if value is not None and value not in accepted:
            expected = " or ".join(repr(one) for one in accepted) or "absent"
            raise self.fail(key, value, f"is not supported; expected {expected}")

    def rope(self, default_theta: float) -> RopeSpec:
        """Both forms: `rope_parameters` {rope_type, rope_theta}, and the older `rope_theta` with `rope_scaling`."""
        theta, key = self.get("rope_theta"), "rope_theta"
        for form in ("rope_parameters", "rope_scaling"):
            parameters = self.get(form)
            if parameters is None:
                continue
            if not isinstance(parameters, dict):
                raise self.fail(form, parameters, "must be an object")
            rope_type = parameters.get("rope_type", parameters.get("type", "default"))
            if rope_type != "default":
                raise self.fail(f"{form}.rope_type", rope_type, "is not supported; expected 'default'")
            if parameters.get("partial_rotary_factor", 1.0) != 1.0:
                factor = parameters["partial_rotary_factor"]
                raise self.fail(f"{form}.partial_rotary_factor", factor, "is not supported; expected 1.0")
            if parameters.get("rope_theta") is not None:
                theta, key = parameters["rope_theta"], f"{form}.rope_theta"
                break
        return RopeSpec(theta=self.positive(key, theta, default_theta))

    def dtype(self) -> Dtype | None:
        for key in ("dtype", "torch_dtype"):
            value = self.get(key)
            if value is not None:
                name = value.removeprefix("torch.") if isinstance(value, str) else value
                if name not in ("bfloat16", "float16", "float32"):
                    raise self.fail(key, value, "is not supported; expected 'bfloat16', 'float16' or 'float32'")
                return cast(Dtype, name)
        return None


def _attention(keys: _Keys, *, head_dim_default: int | None, qk_norm: bool, bias: bool, window: int | None) -> AttentionSpec:
    num_heads = keys.integer("num_attention_heads")
    num_kv_heads = keys.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise keys.fail("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    head_dim = keys.integer("head_dim", head_dim_default or max(1, keys.integer("hidden_size") // num_heads))
    if head_dim % 2:
        raise keys.fail("head_dim", head_dim, "must be even: rotary positions turn pairs")
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, sliding_window=window
    )


def _experts(keys: _Keys, *, ffn_key: str, renormalize: bool) -> MoESpec:
    # Transformers 5 writes num_local_experts for both; Qwen3's own files say num_experts.
    counts = {key: keys.integer(key, high=EXPERTS_MAX) for key in ("num_experts", "num_local_experts") if keys.get(key) is not None}
    if not counts:
        raise CheckpointError(f"{keys.path}: num_experts is missing")
    if len(set(counts.values())) > 1:
        raise keys.fail("num_local_experts", counts["num_local_experts"], f"differs from num_experts={counts['num_experts']}")
    num_experts = next(iter(counts.values()))
    top_k = keys.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise keys.fail("num_experts_per_tok", top_k, f"is more than the {num_experts} experts")
    return MoESpec(num_experts=num_experts, top_k=top_k, ffn=keys.integer(ffn_key), renormalize=renormalize)


def _decoder(keys: _Keys, name: str, layers: tuple[LayerSpec, ...], *, theta: float, eps: float, positions: int) -> DecoderSpec:
    keys.only("hidden_act", "silu")
    keys.only("quantization_config")
    keys.only("partial_rotary_factor", 1.0)
    if not any(isinstance(layer.ffn, MoESpec) for layer in layers):
        raise CheckpointError(f"{keys.path}: no layer has experts (mlp_only_layers, decoder_sparse_step)")
    vocab_size = keys.integer("vocab_size")
    return DecoderSpec(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=keys.integer("hidden_size"),
        layers=layers,
        rope=keys.rope(theta),
        rms_norm_eps=keys.number("rms_norm_eps", eps),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        max_position_embeddings=keys.integer("max_position_embeddings", positions),
        eos_token_ids=_eos_token_ids(keys, vocab_size),
        dtype=keys.dtype(),
    )


def _eos_token_ids(keys: _Keys, vocab_size: int) -> tuple[int, ...]:
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


def _qwen3_moe(keys: _Keys) -> DecoderSpec:
    window = keys.integer("sliding_window", 4096) if keys.boolean("use_sliding_window", False) else None
    bias = keys.boolean("attention_bias", False)
    attention = _attention(keys, head_dim_default=None, qk_norm=True, bias=bias, window=window)
    experts = _experts(keys, ffn_key="moe_intermediate_size", renormalize=keys.boolean("norm_topk_prob", False))
    num_layers = keys.integer("num_hidden_layers", high=LAYERS_MAX)
    sparse_step = keys.integer("decoder_sparse_step", 1)
    mlp_only = keys.get("mlp_only_layers") or []
    if not isinstance(mlp_only, list) or not all(isinstance(index, int) for index in mlp_only):
        raise keys.fail("mlp_only_layers", mlp_only, "must be a list of layer indices")
    layers = []
    for index in range(num_layers):
        is_dense = index in mlp_only or (index + 1) % sparse_step != 0
        ffn = DenseSpec(ffn=keys.integer("intermediate_size")) if is_dense else experts
        layers.append(LayerSpec(attention=attention, ffn=ffn))
    return _decoder(keys, "qwen3_moe", tuple(layers), theta=10_000.0, eps=1e-6, positions=32768)


def _mixtral(keys: _Keys) -> DecoderSpec:
    keys.only("attention_bias", False)
    window = keys.integer("sliding_window") if keys.get("sliding_window") is not None else None
    attention = _attention(keys, head_dim_default=None, qk_norm=False, bias=False, window=window)
    experts = _experts(keys, ffn_key="intermediate_size", renormalize=True)
    num_layers = keys.integer("num_hidden_layers", high=LAYERS_MAX)
    layers = (LayerSpec(attention=attention, ffn=experts),) * num_layers
    return _decoder(keys, "mixtral", layers, theta=1_000_000.0, eps=1e-5, positions=4096 * 32)


_READERS: dict[str, Callable[[_Keys], DecoderSpec]] = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral}


def read_spec(model_dir: Path) -> DecoderSpec:
    if not model_dir.is_dir():
        raise CheckpointError(f"model={str(model_dir)!r} is not a directory; give a Hugging Face checkpoint's folder")
    keys = _Keys(model_dir / "config.json")
    model_type = keys.get("model_type")
    architectures = keys.get("architectures")
    if model_type is None and isinstance(architectures, list) and architectures:
        model_type = _ARCHITECTURES.get(str(architectures[0]), architectures[0])
    if model_type not in _READERS:
        raise keys.fail("model_type", model_type, f"is not supported; switchgear serves {', '.join(sorted(_READERS))}")
    return _READERS[cast(str, model_type)](keys)
