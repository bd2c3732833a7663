"""fp8 weights: e4m3 codes with an fp32 scale for each block of 128 x 128, as one piece of memory, and how they are made.

A value is code * scale. The codes of [N, K] lie by rows, then, from the next multiple of 16 bytes on, the scales
[ceil(N / 128), ceil(K / 128)]: so a matrix is one address, as bf16's are. On a device its dtype is float8_e4m3fn, one
dimension; scales are within.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_runtime.weight_format import FP8_BLOCK, fp8_bytes

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """[N, K], as products take it."""

    data: Tensor
    num_out: int
    num_k: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_out, self.num_k


def quantize_fp8(weight_NK: Tensor) -> Tensor:
    """Each block's scale is its largest magnitude over 448; a code is the nearest to value / scale. ValueError: a value that
    is not finite."""
    if not bool(weight_NK.isfinite().all()):
        raise ValueError("a weight that is not finite cannot be quantised")
    num_out, num_k = weight_NK.shape
    padded = functional.pad(weight_NK.float(), (0, -num_k % FP8_BLOCK, 0, -num_out % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / torch.where(scales > 0, scales, 1.0)[:, None, :, None]).to(FP8)
    return join_fp8(codes.flatten(2).flatten(0, 1)[:num_out, :num_k], scales)


def join_fp8(codes_NK: Tensor, scales_NK: Tensor) -> Tensor:
    """Codes and scales as one."""
    num_out, num_k = codes_NK.shape
    joined = torch.zeros(fp8_bytes(num_out, num_k), dtype=torch.uint8, device=codes_NK.device)
    joined[: num_out * num_k] = codes_NK.reshape(-1).view(torch.uint8)
    scales = scales_NK.float().contiguous().view(torch.uint8).reshape(-1)
    joined[joined.numel() - scales.numel() :] = scales
    return joined.view(FP8)


def split_fp8(weight: Fp8Weight) -> tuple[Tensor, Tensor]:
    """(codes [N, K], scales [ceil(N / 128), ceil(K / 128)])."""
    num_out, num_k = weight.shape
    raw = weight.data.view(torch.uint8)
    blocks = -(-num_out // FP8_BLOCK), -(-num_k // FP8_BLOCK)
    scales = raw[raw.numel() - 4 * blocks[0] * blocks[1] :].clone().view(torch.float32).view(blocks)
    return raw[: num_out * num_k].view(FP8).view(num_out, num_k), scales


def dequantize_fp8(weight: Fp8Weight) -> Tensor:
    """[N, K] fp32."""
    codes_NK, scales = split_fp8(weight)
    wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return codes_NK.float() * wide[: weight.num_out, : weight.num_k]
