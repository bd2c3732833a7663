"""The twin of csrc/kernels/pack.cpp in plain torch: `pack` gives the same bytes, `unpack` what they stand for.

Letters: N rows of a weight, K its columns, P panels, L the 64 lanes of a panel, G groups of 32 along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear_runtime.quantization import VALUES, quantize_int4, quantize_int8
from switchgear_runtime.weight_format import INT4_GROUP

PANEL = 64
TILE = 16  # lanes of a panel that lie together in the quantised formats
INT4_PAD = 8  # the code nearest zero
_TILES = PANEL // TILE
_SCALE_BYTES = {"int8": PANEL * 4, "int4": PANEL * 2}  # of a panel, and of a panel's group
_INT4_GROUP_BYTES = _SCALE_BYTES["int4"] + PANEL * INT4_GROUP // 2


def rows_of_lanes(num_out: int, *, gate_up: bool = False) -> Tensor:
    """[P, L]: the row that each lane of each panel holds, -1 for padding."""
    if not gate_up:
        rows = torch.arange(-(-num_out // PANEL) * PANEL).view(-1, PANEL)
        return torch.where(rows < num_out, rows, -1)
    ffn, half = num_out // 2, PANEL // 2
    gates = torch.arange(-(-ffn // half) * half).view(-1, half)
    return torch.where(torch.cat([gates, gates], 1) < ffn, torch.cat([gates, gates + ffn], 1), -1)


def pack(weight_NK: Tensor, format: str, *, gate_up: bool = False) -> Tensor:
    """uint8: the matrix as the kernels read it."""
    rows_PL = rows_of_lanes(weight_NK.shape[0], gate_up=gate_up)

    def lanes(values: Tensor, pad: float) -> Tensor:
        """[N, ...] -> [P, L, ...]."""
        return torch.cat([values, torch.full_like(values[:1], pad)])[rows_PL]

    num_panels = rows_PL.shape[0]
    if format == "f32":
        return _bytes(lanes(weight_NK.float(), 0.0).transpose(1, 2))
    if format == "bf16":
        pairs = _split(_pad_columns(lanes(weight_NK.bfloat16(), 0.0), 2, 0), 2, -1, 2)
        return _bytes(pairs.transpose(1, 2))
    if format == "int8":
        codes_NK, scales_N = quantize_int8(weight_NK)
        codes = _split(_split(_pad_columns(lanes(codes_NK, 0), 2, 0), 2, -1, 2), 1, _TILES, TILE)
        parts = (lanes(scales_N, 0.0), codes.permute(0, 3, 1, 4, 2))  # pair, tile, parity, lane
        return torch.cat([_bytes(part).view(num_panels, -1) for part in parts], 1).flatten()
    codes_NK, scales_NG = quantize_int4(weight_NK)
    codes = _pad_columns(lanes(codes_NK, INT4_PAD), INT4_GROUP, INT4_PAD).int()
    codes = _split(_split(codes, 2, -1, 4, 4, 2), 1, _TILES, TILE)  # [P, tile, lane, G, vector, nibble, parity]
    words = (codes << torch.arange(0, 16, 4, dtype=torch.int32).view(4, 1)).sum(5, dtype=torch.int32)
    words = words.permute(0, 3, 1, 4, 2, 5)  # [P, G, tile, vector, lane, parity]
    nibbles = torch.stack([words & 255, words >> 8], -1).to(torch.uint8)
    parts = (lanes(scales_NG, 0.0).transpose(1, 2), nibbles)
    num_groups = scales_NG.shape[1]
    return torch.cat([_bytes(part).view(num_panels, num_groups, -1) for part in parts], 2).flatten()


def unpack(data: Tensor, format: str, num_out: int, num_k: int, *, gate_up: bool = False) -> Tensor:
    """[N, K] in float64: the numbers that products with a packed matrix take."""
    rows_PL = rows_of_lanes(num_out, gate_up=gate_up)
    panels = data.view(rows_PL.shape[0], -1)
    if format == "f32":
        lanes = _split(_view(panels, torch.float32), 1, -1, PANEL).transpose(1, 2).double()
    elif format == "bf16":
        pairs = _split(_view(panels, torch.bfloat16), 1, -1, PANEL, 2)
        lanes = pairs.transpose(1, 2).flatten(2).double()
    elif format == "int8":
        scales = _view(panels[:, : _SCALE_BYTES[format]], torch.float32)
        codes = _split(_view(panels[:, _SCALE_BYTES[format] :], torch.int8), 1, -1, _TILES, 2, TILE)
        lanes = codes.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2).double() * scales.double()[..., None]
    else:
        groups = _split(panels, 1, -1, _INT4_GROUP_BYTES)
        scales = _view(groups[..., : _SCALE_BYTES[format]], torch.bfloat16).double().transpose(1, 2)
        halves = _split(groups[..., _SCALE_BYTES[format] :], 2, _TILES, 4, TILE, 2, 2)
        codes = torch.stack([halves & 15, halves >> 4], -1)  # [P, G, tile, vector, lane, parity, byte, nibble]
        codes = codes.permute(0, 2, 4, 1, 3, 6, 7, 5).flatten(1, 2).flatten(3)  # [P, L, G, 32]
        values = torch.tensor(VALUES, dtype=torch.float64)[codes.long()]
        lanes = (values * scales[..., None]).flatten(2)
    weight_NK = torch.zeros((num_out, num_k), dtype=torch.float64)
    weight_NK[rows_PL[rows_PL >= 0]] = lanes[rows_PL >= 0][:, :num_k]
    return weight_NK


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.contiguous().view(dtype)


def _split(values: Tensor, dim: int, *sizes: int) -> Tensor:
    return values.reshape(*values.shape[:dim], *sizes, *values.shape[dim + 1 :])


def _pad_columns(values: Tensor, multiple: int, pad: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % multiple), value=pad)
