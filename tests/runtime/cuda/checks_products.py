"""Checks of the products (gemm*.cu) against chains in numpy, one step of k at a time, on random input."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from arena import Arena, Checked, at, of_bf16, to_bf16

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import ADD, BF16, FP8, FP32, MMA, SILU_MUL, STORE, WGMMA


def families(library: Checked) -> list[int]:
    """That the device has."""
    return [family for family in (MMA, WGMMA) if library.sg_cuda_gemm_tiles(family, 1, BF16)]


@contextmanager
def few_blocks(library: Checked, multiprocessors: int) -> Iterator[None]:
    """Inside, products are launched as on so many multiprocessors: a block takes one tile after another also where there are
    few. 0: as many as the device has (the twin: two)."""
    library.sg_cuda_gemm_assume(multiprocessors, 0)
    try:
        yield
    finally:
        library.sg_cuda_gemm_assume(0, 0)


def is_long(seed: int) -> bool:
    """Rows so long that the ring of stages goes round several times; few seeds, for numpy's chains take a while."""
    return seed % 7 == 6


def chains(x_MK: np.ndarray, w_NK: np.ndarray) -> np.ndarray:
    """Of fp32: an fma per k, in ascending order. (A double holds the product exactly, its sum nearly always.)"""
    sums = np.zeros((len(x_MK), len(w_NK)), np.float32)
    for k in range(x_MK.shape[1]):
        sums = (x_MK[:, k, None].astype(np.float64) * w_NK[None, :, k] + sums).astype(np.float32)
    return sums


def silu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = gate.astype(np.float64)
    return (gate / (1 + np.exp(-gate)) * up).astype(np.float32)


def draw_sizes(rng: np.random.Generator, grouped: bool) -> np.ndarray:
    """Rows of each slot: few or many slots, some empty; or one with everything; some fill the widest tile."""
    if not grouped:
        return rng.integers(1, 170, 1) if rng.integers(4) else np.array([128])
    num_slots = int(rng.choice([1, 2, 5, 33, 70]))
    if rng.integers(4) == 0:
        sizes = np.zeros(num_slots, np.int64)
        sizes[rng.integers(num_slots)] = rng.integers(1, 280)
        return sizes
    return rng.integers(0, 40 if num_slots < 9 else 9, num_slots) * rng.integers(0, 2, num_slots)


class Product:
    """Random operands, arguments, and what must come out of a product of any kind."""

    def __init__(self, arena: Arena, seed: int, *, num_ks: tuple[int, ...], num_outs: tuple[int, ...]) -> None:
        self.arena = arena
        rng = self.rng = arena.rng
        self.grouped = bool(seed % 2)
        self.epilogue = (STORE, ADD, SILU_MUL)[seed // 2 % 3]
        self.y_dtype = FP32 if self.epilogue == ADD else int(rng.choice([FP32, BF16]))
        self.sizes = draw_sizes(rng, self.grouped)
        self.num_slots = len(self.sizes)
        self.num_rows, self.num_x = int(self.sizes.sum()), int(self.sizes.sum()) + 3
        self.num_k = int(rng.choice(num_ks))
        num_out = 2 * int(rng.choice(num_outs))
        self.num_out = num_out if self.epilogue == SILU_MUL else num_out - int(rng.integers(2))
        self.num_results = self.num_out // 2 if self.epilogue == SILU_MUL else self.num_out
        self.x_rows = rng.permutation(self.num_x)[: self.num_rows] if rng.integers(2) else np.arange(self.num_rows)
        self.y_rows = rng.permutation(self.num_x)[: self.num_rows] if rng.integers(2) else np.arange(self.num_rows)
        self.begin = np.concatenate([[0], self.sizes.cumsum()])
        self.bias_N = arena.normals(self.num_out) if rng.integers(2) else None
        self.scale = np.float32(rng.choice([1.0, 0.22]))
        self.y = arena.room((self.num_x, self.num_results), np.float32 if self.y_dtype == FP32 else np.uint16)
        if self.epilogue == ADD:
            self.y[...] = rng.standard_normal(self.y.shape)

    def arguments(self, x: np.ndarray, weights: list[np.ndarray], **more: Any) -> structs.Gemm:
        """More rows than there are fit; an order that is as it is may be given or not."""
        arena, rng = self.arena, self.rng
        rows = {"x_rows": self.x_rows, "y_rows": self.y_rows}
        given = {
            name: at(arena.put(order, np.int32))
            for name, order in rows.items()
            if rng.integers(2) or (order != np.arange(self.num_rows)).any()
        }
        return structs.Gemm(
            x=at(x),
            w=None if self.grouped else at(weights[0]),
            w_S=at(arena.put([at(one) for one in weights], np.int64)) if self.grouped else None,
            bias_N=at(self.bias_N),
            y=at(self.y),
            begin_S1=at(arena.put(self.begin, np.int32)) if self.grouped else None,
            max_rows=self.num_rows + (int(rng.integers(0, 50)) if self.grouped else 0),
            expected_rows=int(rng.choice([0, 1, self.num_rows])),
            num_out=self.num_out,
            num_k=self.num_k,
            num_slots=self.num_slots,
            scale=self.scale,
            y_dtype=self.y_dtype,
            epilogue=self.epilogue,
            **given,
            **{"x_dtype": BF16, "w_dtype": BF16, "x_parts": 1, **more},
        )

    def expected(self, sums_of: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        """`sums_of(rows of x, slot)`: the products before bias, scale and epilogue."""
        expected = self.y.copy()
        for slot in range(self.num_slots):
            rows = slice(self.begin[slot], self.begin[slot + 1])
            sums = sums_of(self.x_rows[rows], slot)
            values = (sums if self.bias_N is None else sums + self.bias_N) * self.scale
            if self.epilogue == SILU_MUL:
                values = silu_mul(values[:, : self.num_results], values[:, self.num_results :])
            if self.epilogue == ADD:
                values = self.y[self.y_rows[rows]] + values
            expected[self.y_rows[rows]] = values if self.y_dtype == FP32 else to_bf16(values)
        return expected

    def compare(self, expected: np.ndarray, label: str, *, exact: bool) -> None:
        """Exact, but for silu, on the twin; a tensor core adds in an order of its own."""
        self.arena.check()
        y = self.y
        untouched = np.setdiff1d(np.arange(self.num_x), self.y_rows)
        assert (y[untouched] == expected[untouched]).all(), f"{label}: a row that is nobody's"
        if self.y_dtype == BF16:
            y, expected = of_bf16(y), of_bf16(expected)
        if self.epilogue == SILU_MUL or not exact:
            near = 1e-2 if self.y_dtype == BF16 else 2e-6 if exact else 1e-4
            assert np.allclose(y, expected, rtol=near, atol=near * 10 * max(1.0, self.num_k / 456)), (
                f"{label}: {np.abs(y - expected).max()}"
            )
        else:
            assert y.tobytes() == expected.tobytes(), f"{label}: {np.abs(y - expected).max()}"


def check_gemm_mma(library: Checked, seed: int) -> None:
    _check_gemm(library, seed, MMA)


def check_gemm_wgmma(library: Checked, seed: int) -> None:
    if WGMMA in families(library):
        _check_gemm(library, seed, WGMMA)


def check_rows_mma(library: Checked, seed: int) -> None:
    check_row_independence(library, seed, MMA)


def check_rows_wgmma(library: Checked, seed: int) -> None:
    if WGMMA in families(library):
        check_row_independence(library, seed, WGMMA)


def _check_gemm(library: Checked, seed: int, family: int) -> None:
    """Plain and grouped, all epilogues, all tiles."""
    arena = Arena(library, seed)
    sizes = {"num_ks": (8, 16, 64, 72, 136, 200, 456), "num_outs": (1, 4, 33, 64, 70, 200)}
    product = Product(arena, seed, **({"num_ks": (1032, 2056), "num_outs": (4, 33)} if is_long(seed) else sizes))
    rng = product.rng
    x = of_bf16(to_bf16(rng.standard_normal((product.num_x, product.num_k))))
    w = of_bf16(to_bf16(rng.standard_normal((product.num_slots, product.num_out, product.num_k))))
    expected = product.expected(lambda rows, slot: chains(x[rows], w[slot]))
    args = product.arguments(
        arena.put(to_bf16(x), np.uint16),
        [arena.put(to_bf16(one), np.uint16) for one in w],
        family=family,
        tile=int(rng.integers(1 + library.sg_cuda_gemm_tiles(family, 1, BF16))),
    )
    with few_blocks(library, seed // 6 % 3):
        library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    product.compare(expected, f"seed {seed}, family {family}, tile {args.tile}", exact=not library.is_gpu)


def split(x: np.ndarray) -> np.ndarray:
    """[..., 3, K] bf16 bits of fp32 [..., K]."""
    parts, left = [], x
    for _ in range(3):
        parts.append(to_bf16(left))
        left = left - of_bf16(parts[-1])
    return np.stack(parts, -2)


def check_split_rows(library: Checked, seed: int) -> None:
    """The parts' sum is the whole, exactly."""
    arena = Arena(library, seed)
    num_rows, hidden = int(arena.rng.integers(1, 9)), int(arena.rng.choice([1, 8, 200, 520]))
    x = arena.put(arena.rng.standard_normal((num_rows, hidden)) * 2.0 ** arena.rng.integers(-90, 90), np.float32)
    parts = arena.room((num_rows, 3, hidden), np.uint16)
    library.sg_cuda_split_rows(at(x), num_rows, hidden, at(parts), None)
    arena.check()
    assert (of_bf16(parts).astype(np.float64).sum(1) == x).all(), f"seed {seed}"
    assert (parts == split(x)).all(), f"seed {seed}"


def check_gemm_parts(library: Checked, seed: int) -> None:
    """fp32 rows in three bf16 parts: each is a chain of its own."""
    arena = Arena(library, seed)
    product = Product(arena, seed, num_ks=(1032,) if is_long(seed) else (8, 72, 200), num_outs=(1, 4, 33, 64))
    rng = product.rng
    parts = arena.put(split(rng.standard_normal((product.num_x, product.num_k)).astype(np.float32)), np.uint16)
    wide = of_bf16(parts)
    w = of_bf16(to_bf16(rng.standard_normal((product.num_slots, product.num_out, product.num_k))))

    def sums_of(rows: np.ndarray, slot: int) -> np.ndarray:
        first, second, third = (chains(wide[rows, part], w[slot]) for part in range(3))
        return (third + second) + first

    expected = product.expected(sums_of)
    args = product.arguments(
        parts,
        [arena.put(to_bf16(one), np.uint16) for one in w],
        x_parts=3,
        tile=int(rng.integers(1 + library.sg_cuda_gemm_tiles(MMA, 3, BF16))),
    )
    with few_blocks(library, seed // 6 % 3):
        library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    product.compare(expected, f"seed {seed}, tile {args.tile}", exact=not library.is_gpu)


def check_rows_parts(library: Checked, seed: int) -> None:
    check_row_independence(library, seed, MMA, x_parts=3)


def check_row_independence(library: Checked, seed: int, family: int, *, x_parts: int = 1, w_dtype: int = BF16) -> None:
    """A row's bits are the same alone and among others, in a plain product and in a grouped one, in every tile."""
    arena = Arena(library, seed)
    rng = arena.rng
    num_rows, num_k, num_out = int(rng.integers(100, 170)), 144, 96
    x = arena.put(to_bf16(rng.standard_normal((num_rows, x_parts, num_k))), np.uint16)
    w = arena.put(to_bf16(rng.standard_normal((num_out, num_k))), np.uint16)
    if w_dtype == FP8:
        w = arena.put(rng.integers(0, 120, library.sg_cuda_weight_bytes(num_out, num_k, FP8)), np.uint8)
        w[-8:] = np.full(2, 0.01, np.float32).view(np.uint8)
    y, alone = arena.room((num_rows, num_out), np.float32), arena.room(num_out, np.float32)
    args = structs.Gemm(x=at(x), w=at(w), y=at(y), max_rows=num_rows, num_out=num_out, num_k=num_k, num_slots=1)
    args.scale, args.x_parts, args.family, args.x_dtype, args.w_dtype = 1.0, x_parts, family, BF16, w_dtype
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    assert np.isfinite(y).all()
    row = int(rng.integers(num_rows))
    args.x, args.y, args.max_rows = at(x[row]), at(alone), 1
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    assert y[row].tobytes() == alone.tobytes(), f"seed {seed}"
    for tile in range(1, 1 + library.sg_cuda_gemm_tiles(family, x_parts, w_dtype)):
        tiled = arena.room((num_rows, num_out), np.float32)
        args.x, args.y, args.max_rows, args.tile = at(x), at(tiled), num_rows, tile
        with few_blocks(library, 1 + tile % 2):
            library.sg_cuda_gemm_rows(ctypes.byref(args), None)
        assert y.tobytes() == tiled.tobytes(), f"seed {seed}: family {family}, tile {tile}"
        for fewer in (9, 17, 33, 65, 97):  # one more than a narrower product has
            first = arena.room((fewer, num_out), np.float32)
            args.y, args.max_rows = at(first), fewer
            library.sg_cuda_gemm_rows(ctypes.byref(args), None)
            assert y[:fewer].tobytes() == first.tobytes(), f"seed {seed}: family {family}, tile {tile}, {fewer} rows"
    args.tile = 0
    cut = int(rng.integers(1, num_rows))
    grouped = arena.room((num_rows, num_out), np.float32)
    args.x, args.y, args.max_rows, args.num_slots = at(x), at(grouped), num_rows, 3
    args.w, args.w_S = None, at(arena.put([at(w)] * 3, np.int64))
    args.begin_S1 = at(arena.put([0, cut, cut, num_rows], np.int32))
    library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    assert y.tobytes() == grouped.tobytes(), f"seed {seed}"
    arena.check()
