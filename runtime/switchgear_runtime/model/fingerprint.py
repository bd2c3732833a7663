"""What ranks must have in common to compute the same bits: `fingerprint_of`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.spec import DecoderSpec


def fingerprint_of(
    identity: Mapping[str, str],
    config: EngineConfig,
    spec: DecoderSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    forced_routing: str | None,
) -> str:
    """`identity`: of the arithmetic (Backend.identity). `forced_routing`: digest of its trace."""
    parts: Mapping[str, object] = {
        **identity,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "dispatch_dtype": config.dispatch_dtype,
        "block_size": config.block_size,
        "checkpoint": checkpoint.identity(),
        "model": hashlib.sha256(repr(spec).encode()).hexdigest()[:16],
    }
    if forced_routing is not None:
        parts = {**parts, "forced_routing": forced_routing}
    return " ".join(f"{name}={value}" for name, value in parts.items())
