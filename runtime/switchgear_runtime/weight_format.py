"""Which format a weight is kept in, from its kind and the settings: `weight_format`. Imports no torch.

Quantisation takes what makes up the bytes: the experts, the dense layers (attention, dense and shared ffn) and, but for
fp8, the matrix of the logits, which checkpoints in fp8 leave as it is. What decides between experts (the router, a shared
expert's gate) stays fp32, as do norms and biases; the embedding's lookup table keeps the run's dtype, since a token reads
one row of it.
"""

from __future__ import annotations

from typing import Literal

from switchgear_runtime.errors import ConfigError

Kind = Literal["experts", "dense", "lm_head", "router"]
Format = Literal["f32", "bf16", "int8", "int4", "fp8"]
FORMATS: tuple[Format, ...] = ("f32", "bf16", "int8", "int4")  # of the host, in the order of csrc/kernels/pack.h
KINDS: tuple[Kind, ...] = ("experts", "dense", "lm_head", "router")
QUANTIZATIONS = ("none", "int8", "int4", "fp8")
DEVICE_QUANTIZATIONS = ("none", "fp8")
INT4_GROUP = 32  # weights along K that share a scale
FP8_BLOCK = 128  # rows, and columns, that share a scale

_PLAIN: dict[str, Format] = {"bfloat16": "bf16", "float32": "f32"}
_QUANTIZED: dict[str, Format] = {"int8": "int8", "int4": "int4", "fp8": "fp8"}


def weight_format(kind: Kind, dtype: str, quantization: str) -> Format:
    """`dtype`: the run's, "bfloat16" or "float32" (after "auto"). ConfigError where quantization does not go with it."""
    check_quantization(dtype, quantization)
    if kind == "router":
        return "f32"
    if kind == "lm_head" and quantization == "fp8":
        return "bf16"
    return _PLAIN[dtype] if quantization == "none" else _QUANTIZED[quantization]


def fp8_bytes(num_out: int, num_k: int) -> int:
    """Of [N, K] in fp8: codes up to a multiple of 16 bytes, and an fp32 scale for each block."""
    return -(-num_out * num_k // 16) * 16 + 4 * -(-num_out // FP8_BLOCK) * -(-num_k // FP8_BLOCK)


def check_quantization(dtype: str, quantization: str) -> None:
    if quantization != "none" and dtype != "bfloat16":
        raise ConfigError(
            f"quantization={quantization!r} needs dtype='bfloat16', and the dtype is {dtype!r}; "
            "give dtype='bfloat16', or quantization='none'"
        )
