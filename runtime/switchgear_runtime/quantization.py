"""The twin of csrc/kernels/isa/quantize.cpp in plain torch: slow, easy to read, and the same bits.

Letters: N rows of a weight, K its columns, G groups of 32 along K, I the 32 weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear_runtime.weight_format import INT4_GROUP

VALUES = (-127, -99, -78, -61, -47, -34, -22, -10, 1, 12, 23, 35, 49, 64, 82, 105)  # of the 16 codes; codebook.h
DIVISORS = (-136, -132, -128, -124, -120, 104, 108, 112)  # what a group's largest weight may become
NEGLIGIBLE = 2.0**-60  # smaller weights count as zero
INT8_MAX_CODE = 127.0


def quantize_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes_NK int8, scales_N fp32): weight is about code * scale."""
    weight_NK = _finite(weight_NK)
    largest_N = weight_NK.abs().amax(1)
    is_zero_N = largest_N < NEGLIGIBLE
    # Not INT8_MAX_CODE / largest_N: torch makes that a product with the reciprocal, which rounds twice.
    inverse_N = torch.where(is_zero_N, 0.0, torch.full_like(largest_N, INT8_MAX_CODE) / largest_N)
    codes_NK = torch.round(weight_NK * inverse_N[:, None])  # ties to even
    return codes_NK.to(torch.int8), torch.where(is_zero_N, 0.0, largest_N / INT8_MAX_CODE)


def quantize_int4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes_NK uint8, scales_NG bf16): weight is about VALUES[code] * scale; K is padded with zeros to a group."""
    weight_NK = _finite(weight_NK)
    num_rows, num_k = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK, (0, -num_k % INT4_GROUP))
    groups_GI = padded.reshape(-1, INT4_GROUP)
    at_G1 = groups_GI.abs().argmax(1, keepdim=True)  # the first of equals
    largest_G = groups_GI.gather(1, at_G1)[:, 0]
    is_zero_G = largest_G.abs() < NEGLIGIBLE
    largest_G = torch.where(is_zero_G, 1.0, largest_G)

    best_scale_G, best_error_G = torch.zeros_like(largest_G), torch.full_like(largest_G, torch.inf)
    for divisor in DIVISORS:
        scale_G = (largest_G / divisor).bfloat16().float()
        error_G = _error(groups_GI, scale_G, largest_G)
        best_scale_G = torch.where(error_G < best_error_G, scale_G, best_scale_G)
        best_error_G = torch.minimum(best_error_G, error_G)

    codes_GI = _nearest(groups_GI * (1.0 / best_scale_G)[:, None])
    codes_NK = codes_GI.to(torch.uint8).reshape(num_rows, -1)[:, :num_k].contiguous()
    scales_NG = torch.where(is_zero_G, 0.0, best_scale_G).bfloat16().reshape(num_rows, -1)
    return codes_NK, scales_NG


def dequantize_int8(codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    return codes_NK.float() * scales_N[:, None]


def dequantize_int4(codes_NK: Tensor, scales_NG: Tensor) -> Tensor:
    scales_NK = scales_NG.float().repeat_interleave(INT4_GROUP, 1)[:, : codes_NK.shape[1]]
    return torch.tensor(VALUES, dtype=torch.float32)[codes_NK.long()] * scales_NK


def _finite(weight_NK: Tensor) -> Tensor:
    weight_NK = weight_NK.float()
    if not bool(weight_NK.isfinite().all()):
        raise ValueError("weight_NK has a weight that is not finite, and only finite weights can be quantised")
    return weight_NK


def _nearest(t_GI: Tensor) -> Tensor:
    """The code of the value nearest to t; half way, the lower one."""
    values = torch.tensor(VALUES, dtype=torch.float32)
    return torch.bucketize(t_GI, (values[1:] + values[:-1]) / 2)


def _error(groups_GI: Tensor, scale_G: Tensor, largest_G: Tensor) -> Tensor:
    """Sum of squared errors in units of the largest weight, over k in order."""
    inverse_G, relative_G = 1.0 / scale_G, scale_G / largest_G
    values = torch.tensor(VALUES, dtype=torch.float32)
    error_G = torch.zeros_like(scale_G)
    for weight_G in groups_GI.unbind(1):
        t_G = weight_G * inverse_G
        miss_G = t_G - values[_nearest(t_G)]
        error_G = error_G + miss_G * miss_G
    return error_G * (relative_G * relative_G)
