"""Checks of the products (gemm.cu) against chains in numpy, one step of k at a time, on random input."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16, to_bf16

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import ADD, BF16, FP32, SILU_MUL, STORE, DeviceError


def chains(x_MK: np.ndarray, w_NK: np.ndarray) -> np.ndarray:
    """Of fp32: an fma per k, in ascending order. (A double holds the product exactly, its sum nearly always.)"""
    sums = np.zeros((len(x_MK), len(w_NK)), np.float32)
    for k in range(x_MK.shape[1]):
        sums = (x_MK[:, k, None].astype(np.float64) * w_NK[None, :, k] + sums).astype(np.float32)
    return sums


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = gate.astype(np.float64)
    return (gate / (1 + np.exp(-gate)) * up).astype(np.float32)


def check_gemm(library: Checked, seed: int) -> None:
    """Plain and grouped, both dtypes, all epilogues. Exact on the twin; a tensor core adds in an order of its own."""
    arena = Arena(library, seed)
    rng = arena.rng
    is_bf16, grouped = bool(seed % 2), bool(seed // 2 % 2)
    epilogue = int(rng.choice([STORE, ADD, SILU_MUL]))
    y_dtype = FP32 if epilogue == ADD else int(rng.choice([FP32, BF16]))
    num_slots = int(rng.integers(1, 7)) if grouped else 1
    sizes = rng.integers(0, 40, num_slots) * rng.integers(0, 2, num_slots) if grouped else rng.integers(0, 140, 1)
    num_k = int(rng.choice([8, 17, 64, 65, 72, 200, 456]))
    num_out = 2 * int(rng.choice([1, 4, 33, 64, 70, 200]))
    if epilogue != SILU_MUL:
        num_out -= seed // 4 % 2
    num_rows, num_x = int(sizes.sum()), int(sizes.sum()) + 3
    x = rng.standard_normal((num_x, num_k)).astype(np.float32)
    w = rng.standard_normal((num_slots, num_out, num_k)).astype(np.float32)
    if is_bf16:
        x, w = of_bf16(to_bf16(x)), of_bf16(to_bf16(w))
    stored = (
        (lambda array: arena.put(to_bf16(array), np.uint16)) if is_bf16 else lambda array: arena.put(array, np.float32)
    )
    x_stored, w_stored = stored(x), [stored(w[s]) for s in range(num_slots)]
    num_results = num_out // 2 if epilogue == SILU_MUL else num_out
    bias_N = arena.normals(num_out) if rng.integers(2) else None
    scale = np.float32(rng.choice([1.0, 0.22]))
    x_rows = rng.permutation(num_x)[:num_rows] if rng.integers(2) else np.arange(num_rows)
    y_rows = rng.permutation(num_x)[:num_rows] if rng.integers(2) else np.arange(num_rows)
    y = arena.room((num_x, num_results), np.float32 if y_dtype == FP32 else np.uint16)
    if epilogue == ADD:
        y[...] = rng.standard_normal(y.shape)
    expected = y.copy()
    begin = np.concatenate([[0], sizes.cumsum()])
    for s in range(num_slots):
        rows = slice(begin[s], begin[s + 1])
        sums = chains(x[x_rows[rows]], w[s])
        values = (sums if bias_N is None else sums + bias_N) * scale
        if epilogue == SILU_MUL:
            values = silu_mul(values[:, :num_results], values[:, num_results:])
        if epilogue == ADD:
            values = y[y_rows[rows]] + values
        expected[y_rows[rows]] = values if y_dtype == FP32 else to_bf16(values)
    more = int(rng.integers(0, 50)) if grouped else 0  # capacity beyond the rows that there are
    args = structs.Gemm(
        x=at(x_stored),
        w=None if grouped else at(w_stored[0]),
        w_S=at(arena.put([at(one) for one in w_stored], np.int64)) if grouped else None,
        bias_N=at(bias_N),
        y=at(y),
        begin_S1=at(arena.put(begin, np.int32)) if grouped else None,
        x_rows=at(arena.put(x_rows, np.int32)) if rng.integers(2) or (x_rows != np.arange(num_rows)).any() else None,
        y_rows=at(arena.put(y_rows, np.int32)) if rng.integers(2) or (y_rows != np.arange(num_rows)).any() else None,
        max_rows=num_rows + more,
        num_out=num_out,
        num_k=num_k,
        num_slots=num_slots,
        scale=scale,
        x_dtype=BF16 if is_bf16 else FP32,
        y_dtype=y_dtype,
        epilogue=epilogue,
        tile=int(rng.integers(4)),
    )
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    arena.check()
    for wrong in (
        {"epilogue": -1},
        {"epilogue": 3},
        {"epilogue": SILU_MUL, "num_out": 5},
        {"x_dtype": 2},
        {"y_dtype": 2},
        {"epilogue": ADD, "y_dtype": BF16},
        {"x_dtype": BF16, "tile": 4},
    ):
        refused = structs.Gemm(max_rows=1, num_out=2, num_k=8, x_dtype=FP32, y_dtype=FP32)
        for name, value in wrong.items():
            setattr(refused, name, value)
        with pytest.raises(DeviceError):
            library.sg_cuda_gemm_rows(ctypes.byref(refused), None)
    untouched = np.setdiff1d(np.arange(num_x), y_rows)
    assert (y[untouched] == expected[untouched]).all(), f"seed {seed}: a row that is nobody's"
    if y_dtype == BF16:
        y, expected = of_bf16(y), of_bf16(expected)
    if epilogue == SILU_MUL or (library.managed and is_bf16):
        near = 1e-2 if y_dtype == BF16 else 1e-4 if library.managed else 2e-6
        assert np.allclose(y, expected, rtol=near, atol=near * 10), f"seed {seed}: {np.abs(y - expected).max()}"
    else:
        assert y.tobytes() == expected.tobytes(), f"seed {seed}: {np.abs(y - expected).max()}"


def check_row_independence(library: Checked, seed: int) -> None:
    """A row's bits are the same alone and among others, in a plain product and in a grouped one."""
    arena = Arena(library, seed)
    rng = arena.rng
    num_rows, num_k, num_out = 150, 136, 96
    x = arena.put(to_bf16(rng.standard_normal((num_rows, num_k))), np.uint16)
    w = arena.put(to_bf16(rng.standard_normal((num_out, num_k))), np.uint16)
    y, alone = arena.room((num_rows, num_out), np.float32), arena.room(num_out, np.float32)
    args = structs.Gemm(x=at(x), w=at(w), y=at(y), max_rows=num_rows, num_out=num_out, num_k=num_k, num_slots=1)
    args.scale, args.x_dtype = 1.0, BF16
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    row = int(rng.integers(num_rows))
    args.x, args.y, args.max_rows = at(x[row]), at(alone), 1
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    assert y[row].tobytes() == alone.tobytes(), f"seed {seed}"
    for tile in (1, 2, 3):
        tiled = arena.room((num_rows, num_out), np.float32)
        args.x, args.y, args.max_rows, args.tile = at(x), at(tiled), num_rows, tile
        library.sg_cuda_gemm_rows(ctypes.byref(args), None)
        assert y.tobytes() == tiled.tobytes(), f"seed {seed}: tile {tile}"
    args.tile = 0
    cut = int(rng.integers(1, num_rows))
    grouped = arena.room((num_rows, num_out), np.float32)
    args.x, args.y, args.max_rows, args.num_slots = at(x), at(grouped), num_rows, 3
    args.w, args.w_S = None, at(arena.put([at(w)] * 3, np.int64))
    args.begin_S1 = at(arena.put([0, cut, cut, num_rows], np.int32))
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    assert y.tobytes() == grouped.tobytes(), f"seed {seed}"
    arena.check()
