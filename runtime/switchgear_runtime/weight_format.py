"""Which format each kind of weight is packed in: `weight_format`. Imports no torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["experts", "dense", "lm_head", "router"]


def weight_format(kind: Kind, dtype: str, quantization: str) -> str:
    if kind == "router" or dtype == "float32":
        return "f32"
    return "bf16" if quantization == "none" else quantization
