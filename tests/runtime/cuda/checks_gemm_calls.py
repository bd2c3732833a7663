"""Checks of what a call of a product is given (gemm.cu): what it refuses, the process's family, tiles beside many slots."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from arena import Arena, Checked, at, to_bf16
from checks_products import families, split
from checks_rows import to_fp8

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import ADD, BF16, FP8, FP32, INT8, MMA, SILU_MUL, STORE, WGMMA, DeviceError


def check_gemm_refusals(library: Checked, _seed: int) -> None:
    for wrong in (
        {"epilogue": -1},
        {"epilogue": 3},
        {"epilogue": SILU_MUL, "num_out": 5},
        {"y_dtype": 2},
        {"x_dtype": 0},
        {"x_dtype": FP8},
        {"w_dtype": 0},
        {"w_dtype": INT8},
        {"w_dtype": FP8, "x_parts": 3},
        {"w_dtype": FP8, "family": WGMMA},
        {"w_dtype": FP8, "num_k": 24},
        {"w_dtype": FP8, "num_k": 32, "x_dtype": INT8},
        {"num_out": 1 << 20, "num_k": 1 << 15},
        {"epilogue": ADD, "y_dtype": BF16},
        {"x_parts": 0},
        {"x_parts": 2},
        {"num_k": 0},
        {"num_k": 12},
        {"family": -1},
        {"family": 3},
        {"family": WGMMA, "x_parts": 3},
        {"family": WGMMA, "tile": 1 + library.sg_cuda_gemm_tiles(WGMMA, 1, BF16)},
        {"tile": -1},
        {"tile": 1 + library.sg_cuda_gemm_tiles(MMA, 1, BF16)},
        {"x_parts": 3, "tile": 1 + library.sg_cuda_gemm_tiles(MMA, 3, BF16)},
        {"w_dtype": FP8, "num_k": 32, "tile": 1 + library.sg_cuda_gemm_tiles(MMA, 1, FP8)},
        {"max_rows": 1 << 34, "num_out": 1 << 20},
        {"x": 8},
        {"w": 24},
        {"y": 4},
    ):
        refused = structs.Gemm(max_rows=1, num_out=2, num_k=8, x_dtype=BF16, w_dtype=BF16, y_dtype=FP32, x_parts=1)
        for name, value in wrong.items():
            setattr(refused, name, value)
        with pytest.raises(DeviceError):
            library.sg_cuda_gemm_rows(ctypes.byref(refused), None)
    for right in (
        {},
        {"epilogue": SILU_MUL, "num_out": 4},
        {"epilogue": ADD},
        {"y_dtype": BF16},
        {"num_out": 1 << 14, "num_k": 1 << 14},
        {"num_out": (1 << 31) - 1},
        {"w_dtype": FP8, "x_dtype": FP8, "num_k": 16},
        {"x_parts": 3},
    ):
        empty = structs.Gemm(max_rows=0, num_out=2, num_k=8, x_dtype=BF16, w_dtype=BF16, y_dtype=FP32, x_parts=1)
        for name, value in right.items():
            setattr(empty, name, value)
        library.sg_cuda_gemm_rows(ctypes.byref(empty), None)


def check_gemm_family(library: Checked, _seed: int) -> None:
    """One of a process, which the products without a family are of."""
    found = [library.sg_cuda_weight_bytes(130, 144, dtype) for dtype in (FP32, BF16, FP8)]
    assert found == [130 * 144 * 4, 130 * 144 * 2, 130 * 144 + 2 * 2 * 4]
    before = library.sg_cuda_gemm_family()
    with pytest.raises(DeviceError):
        library.sg_cuda_gemm_use(3)
    assert library.sg_cuda_gemm_tiles(0, 1, BF16) == library.sg_cuda_gemm_tiles(3, 1, BF16) == 0
    for family in reversed(families(library)):
        library.sg_cuda_gemm_use(family)
        assert library.sg_cuda_gemm_family() == family
        num_tiles = library.sg_cuda_gemm_tiles(family, 1, BF16)
        refused = structs.Gemm(
            max_rows=1, num_out=2, num_k=8, x_dtype=BF16, w_dtype=BF16, x_parts=1, tile=num_tiles + 1
        )
        with pytest.raises(DeviceError, match=f"not 0 to {num_tiles}"):
            library.sg_cuda_gemm_rows(ctypes.byref(refused), None)
        refused.tile, refused.x_parts, refused.max_rows = 0, 3, 0  # of parts, always the first
        library.sg_cuda_gemm_rows(ctypes.byref(refused), None)
    library.sg_cuda_gemm_use(before)


def check_gemm_many_slots(library: Checked, _seed: int) -> None:
    """Slots take shared memory: whatever tile is chosen has room for it, on this device and on one with 99 KiB."""
    for x_dtype, w_dtype, family, x_parts in (
        *((BF16, BF16, family, 1) for family in families(library)),
        (BF16, BF16, MMA, 3),
        (BF16, FP8, MMA, 1),
        (FP8, FP8, MMA, 1),
    ):
        tiles = range(1, 1 + library.sg_cuda_gemm_tiles(family, x_parts, w_dtype))
        for num_slots in (160, 256, 512):
            launch = _slots_launch(library, num_slots, family=family, x_parts=x_parts, x_dtype=x_dtype, w_dtype=w_dtype)
            for shared_kib in (0,) if family == WGMMA else (0, 99):  # what has wgmma has more
                library.sg_cuda_gemm_assume(0, shared_kib)
                chosen = {launch(expected_rows=rows) for rows in (1, 4000, 20_000, 60_000, 400_000)}
                assert len(chosen) > 1 or shared_kib, f"{num_slots} slots: always tile {chosen}"
                for tile in tiles:
                    try:
                        launch(tile=tile)
                    except DeviceError as error:
                        assert "more shared memory than there is" in str(error)
                        assert shared_kib == 99
                        assert tile not in chosen
                library.sg_cuda_gemm_assume(0, 0)
    too_many = _slots_launch(library, 20_000, family=MMA, x_parts=1, x_dtype=BF16, w_dtype=BF16)
    for settings in ({}, {"tile": 1}):
        with pytest.raises(DeviceError, match="more shared memory than there is"):
            too_many(**settings)


def _slots_launch(
    library: Checked, num_slots: int, *, family: int, x_parts: int, x_dtype: int, w_dtype: int
) -> Callable[..., int]:
    """Multiplies a few rows of some slots, checks what comes, and returns the tile that it took."""
    arena = Arena(library, num_slots)
    num_k, num_out, sizes = 16, 512, np.zeros(num_slots, np.int64)
    sizes[[3, num_slots // 2, num_slots - 1]] = 1, 3, 2
    num_rows = int(sizes.sum())
    x = arena.rng.integers(-3, 4, (num_rows, num_k)).astype(np.float32)  # fp8 has these
    w = arena.rng.integers(-3, 4, (2, num_out, num_k)).astype(np.float32)  # of even slots, of odd ones
    slots = np.repeat(np.arange(num_slots), sizes)
    expected = np.stack([x[row] @ w[slots[row] % 2].T for row in range(num_rows)])
    if x_dtype == FP8:
        stored = arena.put(np.zeros((num_rows, library.sg_cuda_payload_bytes(num_k, FP8))), np.uint8)
        stored[:, :num_k], stored[:, num_k : num_k + 4] = to_fp8(x), np.ones(1, np.float32).view(np.uint8)
    else:
        stored = arena.put(split(x) if x_parts == 3 else to_bf16(x), np.uint16)
    weights = [arena.put(to_bf16(one), np.uint16) for one in w]
    if w_dtype == FP8:
        weights = [arena.put(np.zeros(library.sg_cuda_weight_bytes(num_out, num_k, FP8)), np.uint8) for _ in w]
        for blob, one in zip(weights, w, strict=True):
            blob[: one.size], blob[-16:] = to_fp8(one).ravel(), np.ones(4, np.float32).view(np.uint8)
    weights_S = arena.put([at(weights[slot % 2]) for slot in range(num_slots)], np.int64)
    begin_S1 = arena.put(np.concatenate([[0], sizes.cumsum()]), np.int32)

    def launch(*, expected_rows: int = 0, tile: int = 0) -> int:
        y = arena.room((num_rows, num_out), np.float32)
        args = structs.Gemm(
            x=at(stored),
            w_S=at(weights_S),
            y=at(y),
            begin_S1=at(begin_S1),
            max_rows=max(num_rows, expected_rows),
            expected_rows=expected_rows,
            num_out=num_out,
            num_k=num_k,
            num_slots=num_slots,
            scale=1.0,
            x_dtype=x_dtype,
            w_dtype=w_dtype,
            y_dtype=FP32,
            epilogue=STORE,
            x_parts=x_parts,
            family=family,
            tile=tile,
        )
        took = int(library.sg_cuda_gemm_tile(ctypes.byref(args)))
        library.sg_cuda_gemm_rows(ctypes.byref(args), None)
        arena.check()
        assert (y == expected).all(), f"{num_slots} slots, family {family}, tile {took}"  # small whole numbers: exact
        return took

    return launch
