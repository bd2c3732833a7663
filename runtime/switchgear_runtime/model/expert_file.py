"""The weights of one expert from a file of their own, as `load-expert` takes it: `read_expert_file`.

A safetensors file with three tensors: gate_proj.weight and up_proj.weight [F, D], down_proj.weight [D, F], or under the
names that the checkpoint has for this very expert. Every rank reads it for itself, whole, and compares its digest, so
that no two ranks can compute with different bytes under one version.

Letters: D hidden, F ffn.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.names import ExpertNames
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model.swap_files import SwapFiles
from switchgear_runtime.moe.model_versions import ExpertSwap

NAMES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADER_BYTES_MAX = 1 << 20


def read_expert_file(
    swap: ExpertSwap,
    spec: DecoderSpec,
    names: ExpertNames,
    pace: Pace | None = None,
    files: SwapFiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Gate and up rows [2F, D] and down [D, F], in the file's dtype. Every defect is a CheckpointError naming the path.
    `pace` is told of every piece."""
    bytes_max = HEADER_BYTES_MAX + 4 * 3 * spec.moe.ffn * spec.hidden_size
    data = (files or SwapFiles(None)).read(swap, bytes_max, pace)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{swap.path} is not a safetensors file: {error}") from None
    del data  # one copy less while the parts are joined
    gate_FD, up_FD, down_DF = (tensors[name] for name in _names(swap, spec, names, tensors))
    shape = (spec.moe.ffn, spec.hidden_size)
    for name, tensor, expected in ((0, gate_FD, shape), (1, up_FD, shape), (2, down_DF, shape[::-1])):
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{swap.path}: {NAMES[name]} has shape {list(tensor.shape)}, an expert of this model has {list(expected)}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{swap.path}: {NAMES[name]} has dtype {tensor.dtype}, expected F32, BF16 or F16")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{swap.path}: {NAMES[name]} has a number that is infinite or none")
    return torch.cat([gate_FD, up_FD]), down_DF


def _names(swap: ExpertSwap, spec: DecoderSpec, names: ExpertNames, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Which of the two ways this file names its three tensors."""
    own = None if names.fused else names.expert(spec.moe_layers[swap.layer], swap.expert)
    for known in (NAMES, own):
        if known is not None and set(known) == set(tensors):
            return known
    found = ", ".join(sorted(tensors)[:4]) or "nothing"
    also = "" if own is None else f", or {', '.join(own)}"
    raise CheckpointError(f"{swap.path} holds {found}; expected {', '.join(NAMES)}{also}, and no more")
