"""Checks of the products with fp8 weights (gemm_fp8.cu) against chains in numpy, block of 128 k by block, on random input."""

from __future__ import annotations

import ctypes

import numpy as np
from arena import Arena, Checked, of_bf16, to_bf16
from checks_products import Product, chains, check_row_independence, few_blocks, is_long
from checks_rows import of_fp8, to_fp8

from switchgear_runtime.cuda.library import BF16, FP8, MMA

# Of 16 k, the order in which a step adds products of fp8 weights: a fragment's pairs are the first, then the second two of
# the four k that a thread has.
FP8_ORDER = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


def quantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp8 codes of values over their scales; none is NaN."""
    return to_fp8(np.clip(values / scales, -448, 448).astype(np.float32))


def fp8_sums(x: np.ndarray, x_scales: np.ndarray, w: np.ndarray, w_scales: np.ndarray) -> np.ndarray:
    """Of values without their scales, [M, K] and [N, K]; of [M, K / 128] and [N / 128, K / 128] scales."""
    sums = np.zeros((len(x), len(w)), np.float32)
    order = np.array([16 * (k // 16) + FP8_ORDER[k % 16] for k in range(128)])
    for block in range(w_scales.shape[1]):
        of_block = 128 * block + order
        ks = of_block[of_block < x.shape[1]]
        partial = chains(x[:, ks], w[:, ks]).astype(np.float64)
        scales = x_scales[:, block, None] * np.repeat(w_scales[:, block], 128)[None, : len(w)]
        sums = (partial * scales + sums).astype(np.float32)
    return sums


def check_gemm_fp8(library: Checked, seed: int) -> None:
    """fp8 weights by rows of bf16 and of fp8, plain and grouped, all epilogues, all tiles; every code but NaN."""
    arena = Arena(library, seed)
    sizes = {"num_ks": (16, 48, 128, 144, 256, 400, 512), "num_outs": (1, 4, 33, 64, 70, 150)}
    product = Product(arena, seed, **({"num_ks": (1600, 2064), "num_outs": (4, 33)} if is_long(seed) else sizes))
    rng, num_k, num_out = product.rng, product.num_k, product.num_out
    num_blocks = -(-num_k // 128)
    x = of_bf16(to_bf16(rng.standard_normal((product.num_x, num_k))))
    x_scales = np.ones((product.num_x, num_blocks), np.float32)
    is_fp8 = bool(rng.integers(2)) or (is_long(seed) and seed // 7 % 2 == 0)
    if is_fp8:
        x_scales = (2.0 ** rng.uniform(-9, 1, x_scales.shape)).astype(np.float32)
        codes = quantized(x, np.repeat(x_scales, 128, 1)[:, :num_k])
        payload = np.zeros((product.num_x, library.sg_cuda_payload_bytes(num_k, FP8)), np.uint8)
        payload[:, :num_k] = codes
        payload[:, num_k : num_k + 4 * num_blocks] = x_scales.view(np.uint8)
        x = of_fp8(codes)
    x_stored = arena.put(payload, np.uint8) if is_fp8 else arena.put(to_bf16(x), np.uint16)
    w = rng.integers(0, 256, (product.num_slots, num_out, num_k)).astype(np.uint8)
    w[w % 128 == 127] -= 1
    w_scales = (2.0 ** rng.uniform(-12, -6, (product.num_slots, -(-num_out // 128), num_blocks))).astype(np.float32)
    blobs = []
    for codes, scales in zip(w, w_scales, strict=True):
        blobs.append(arena.room(library.sg_cuda_weight_bytes(num_out, num_k, FP8), np.uint8))
        blobs[-1][: codes.size] = codes.ravel()
        blobs[-1][-scales.nbytes :] = scales.view(np.uint8).ravel()
    expected = product.expected(lambda rows, slot: fp8_sums(x[rows], x_scales[rows], of_fp8(w[slot]), w_scales[slot]))
    num_tiles = library.sg_cuda_gemm_tiles(MMA, 1, FP8)
    is_full = product.sizes.max() == 128  # as many as the widest tile has
    args = product.arguments(
        x_stored,
        blobs,
        x_dtype=FP8 if is_fp8 else BF16,
        w_dtype=FP8,
        tile=num_tiles if is_full else int(rng.integers(1 + num_tiles)),
    )
    with few_blocks(library, seed // 6 % 3):
        library.sg_cuda_gemm_rows(ctypes.byref(args), None)
    product.compare(expected, f"seed {seed}, x fp8 {is_fp8}, tile {args.tile}", exact=not library.is_gpu)


def check_rows_fp8(library: Checked, seed: int) -> None:
    check_row_independence(library, seed, MMA, w_dtype=FP8)
