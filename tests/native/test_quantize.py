"""The quantiser: the twin's bits on every instruction set, the errors it may make, rows alone, and what it refuses."""

from __future__ import annotations

import ctypes
import functools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from switchgear_runtime import native, quantization
from switchgear_runtime.weight_format import FORMATS, INT4_GROUP

Quantised = tuple[Tensor, Tensor]  # codes [N, K]; scales [N] or [N, G]
TWINS = {"int8": quantization.quantize_int8, "int4": quantization.quantize_int4}
SHAPES = [(1, 1), (1, 32), (3, 33), (16, 16), (17, 100), (5, 511), (70, 96), (129, 64), (2, 1030)]
DTYPES = (torch.float32, torch.bfloat16)


def quantise(name: str, weight_NK: Tensor) -> Quantised:
    num_rows, num_k = weight_NK.shape
    if name == "int8":
        codes, scales = torch.full((num_rows, num_k), 99, dtype=torch.int8), torch.full((num_rows,), -1.0)
    else:
        codes = torch.full((num_rows, num_k), 99, dtype=torch.uint8)
        scales = torch.full((num_rows, -(-num_k // INT4_GROUP)), -1.0, dtype=torch.bfloat16)
    failed = native.core().sg_quantize(
        FORMATS.index(name),
        ctypes.c_void_p(weight_NK.contiguous().data_ptr()),
        DTYPES.index(weight_NK.dtype),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(num_k),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(scales.data_ptr()),
    )
    if failed:
        raise ValueError(native.last_error())
    return codes, scales


def random_weight(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Normal weights with rows of every size, heavy tails, zeros, runs of equal weights and denormals."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(shape, generator=generator)
    weight_NK = weight_NK * torch.exp2(torch.randint(-130, 120, (shape[0], 1), generator=generator).float())
    kind = torch.randint(0, 8, shape, generator=generator)
    weight_NK = torch.where(kind == 0, weight_NK * 8, weight_NK)
    weight_NK = torch.where(kind == 1, 0.0, weight_NK)
    weight_NK = torch.where(kind == 2, weight_NK.flatten()[0].clamp(-1, 1), weight_NK)
    weight_NK = torch.where(kind == 3, weight_NK * 2.0**-20, weight_NK)
    return weight_NK.clamp(-3.3e38, 3.3e38).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TWINS)
def test_equals_the_twin_bit_for_bit(
    name: str, dtype: torch.dtype, same_bits_everywhere: Callable[[Callable[[], object]], None]
) -> None:
    base = random.SystemRandom().randrange(1 << 30)
    for offset, shape in enumerate(SHAPES):
        weight_NK = random_weight(base + offset, shape, dtype)
        codes, scales = quantise(name, weight_NK)
        expected_codes, expected_scales = TWINS[name](weight_NK)
        assert torch.equal(codes, expected_codes), f"seed {base + offset}, {shape}"
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8)), f"seed {base + offset}"
        same_bits_everywhere(functools.partial(quantise, name, weight_NK))


@pytest.mark.parametrize("name", TWINS)
def test_a_row_does_not_know_its_neighbours(name: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    weight_NK = random_weight(seed, (40, 77), torch.bfloat16)
    codes, scales = quantise(name, weight_NK)
    for row in range(40):
        row_codes, row_scales = quantise(name, weight_NK[row : row + 1])
        assert torch.equal(row_codes[0], codes[row]), f"seed {seed}"
        assert torch.equal(row_scales[0], scales[row]), f"seed {seed}"


def test_int8_misses_by_at_most_half_a_step() -> None:
    weight_NK = torch.randn(50, 300)
    codes_NK, scales_N = quantise("int8", weight_NK)
    missed = (quantization.dequantize_int8(codes_NK, scales_N) - weight_NK).abs()
    assert (missed <= scales_N[:, None] * 0.501).all()
    assert (codes_NK.abs().amax(1) == 127).all()


def test_int4_error_on_normal_weights() -> None:
    """0.0054 of the variance; uniform levels have 0.0067, 4-bit NormalFloat 0.0070."""
    weight_NK = torch.randn(200, 512)
    missed = quantization.dequantize_int4(*quantise("int4", weight_NK)) - weight_NK
    assert missed.square().mean() < 0.0056


def test_zeros_stay_zeros_and_integers_exact() -> None:
    for name in TWINS:
        codes, scales = quantise(name, torch.zeros(3, 40))
        assert (scales == 0).all()
        assert (codes == (0 if name == "int8" else 8)).all()
    integers_NK = torch.randint(-127, 128, (4, 50)).float()
    integers_NK[:, 0] = 127.0
    assert torch.equal(quantise("int8", integers_NK)[0].float(), integers_NK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TWINS)
def test_what_is_not_finite_is_refused(name: str, bad: float, dtype: torch.dtype) -> None:
    weight_NK = torch.randn(70, 45).to(dtype)
    weight_NK[67, 44] = bad
    with pytest.raises(ValueError, match=r"weight_NK\[67, 44\] is not finite"):
        quantise(name, weight_NK)
    with pytest.raises(ValueError, match="not finite"):
        TWINS[name](weight_NK)


def test_bad_arguments() -> None:
    library = native.core()
    nothing = ctypes.c_void_p(0)
    one = ctypes.c_int64(1)
    assert library.sg_quantize(1, nothing, 0, one, one, nothing, nothing)
    assert "format=1 must be 2 (int8) or 3 (int4)" in native.last_error()
    assert library.sg_quantize(2, nothing, 2, one, one, nothing, nothing)
    assert "weight_dtype=2" in native.last_error()
    assert library.sg_quantize(2, nothing, 0, one, ctypes.c_int64(0), nothing, nothing)
    assert "weight_NK is [1, 0]" in native.last_error()
