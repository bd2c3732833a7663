"""One declarative description of a decoder: `DecoderSpec`, read from a Hugging Face directory by `load_spec`.

There is no file per architecture: an architecture is a reader of config.json (`model/config_json.py`) and a table of
tensor names (`model/names.py`). Imports no torch, so that the server can know a model's limits without
loading one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchgear_runtime.moe.spec import MoESpec

__all__ = ["AttentionSpec", "DecoderSpec", "DenseSpec", "LayerSpec", "MoESpec", "RopeSpec", "load_spec"]

Dtype = Literal["bfloat16", "float16", "float32"]
QKNorm = Literal["head", "projection"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions, pairs (i, i + head_dim / 2)."""

    theta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `kind` has one value until multi-head latent attention joins."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: Literal["gqa"] = "gqa"
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None  # RMS norm of q and k before the rotation: of each head, or over all heads at once
    clip_qkv: float | None = None  # q, k and v are kept within plus and minus this, before the rotation
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it; None: all
    sinks: bool = False  # one learned logit per head that only takes part in the softmax's sum


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpec:
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    ffn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    ffn: DenseSpec | MoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A decoder: embed, layers of attention and ffn, each with a norm and a residual, then norm, lm_head.

    The fields from `norm` on have the values of most models; an architecture sets those it is different in.
    """

    architecture: str  # config.json's model_type
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: Dtype | None  # what config.json says of the weights; None: it does not say
    norm: Norm = "rms"  # "layer": with mean and bias; rms_norm_eps is its epsilon too
    norm_placement: NormPlacement = "pre"  # x + f(norm(x)), or "post": x + norm(f(x))
    lm_head_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and ffn add
    logits_scaling: float = 1.0  # logits are divided by it
    quantization: Literal["fp8"] | None = None  # of the checkpoint's own weights: e4m3, a scale per 128 x 128

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts: row l of an ExpertMap is layer `moe_layers[l]`."""
        return tuple(index for index, layer in enumerate(self.layers) if isinstance(layer.ffn, MoESpec))

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def moe(self) -> MoESpec:
        """What all MoE layers have in common; `load_spec` refuses a model without one."""
        ffn = self.layers[self.moe_layers[0]].ffn
        assert isinstance(ffn, MoESpec)
        return ffn

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts


def load_spec(model_dir: str | Path) -> DecoderSpec:
    """Read config.json and generation_config.json. CheckpointError names the key and value that cannot be served."""
    from switchgear_runtime.model.config_json import read_spec  # that module imports this one

    return read_spec(Path(model_dir))
