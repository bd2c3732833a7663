"""Which format a weight is kept in, from its kind and the settings: `weight_format`. Imports no torch.

Quantisation takes what makes up the bytes: the experts, the dense layers (attention, dense and shared ffn) and the
matrix of the logits. What decides between experts (the router, a shared expert's gate) stays fp32, as do norms and
biases; the embedding's lookup table keeps the run's dtype, since a token reads one row of it.
"""

from __future__ import annotations

from typing import Literal

from switchgear_runtime.errors import ConfigError

Kind = Literal["experts", "dense", "lm_head", "router"]
Format = Literal["f32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("f32", "bf16", "int8", "int4")  # in the order of csrc/kernels/pack.h
KINDS: tuple[Kind, ...] = ("experts", "dense", "lm_head", "router")
QUANTIZATIONS = ("none", "int8", "int4")
INT4_GROUP = 32  # weights along K that share a scale

_PLAIN: dict[str, Format] = {"bfloat16": "bf16", "float32": "f32"}
_QUANTIZED: dict[str, Format] = {"int8": "int8", "int4": "int4"}


def weight_format(kind: Kind, dtype: str, quantization: str) -> Format:
    """`dtype`: the run's, "bfloat16" or "float32" (after "auto"). ConfigError where quantization does not go with it."""
    check_quantization(dtype, quantization)
    if kind == "router":
        return "f32"
    return _PLAIN[dtype] if quantization == "none" else _QUANTIZED[quantization]


def check_quantization(dtype: str, quantization: str) -> None:
    if quantization != "none" and dtype != "bfloat16":
        raise ConfigError(
            f"quantization={quantization!r} needs dtype='bfloat16', and the dtype is {dtype!r}; "
            "give dtype='bfloat16', or quantization='none'"
        )
