"""Checks of the kernels on rows (payload, combine, embedding, norm, branches) against slow numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16, to_bf16

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import BF16, FP8, FP32, INT8, DeviceError


def stored(arena: Arena, x: np.ndarray, dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """As the kernel reads it, and the values that these are."""
    if dtype == FP32:
        return arena.put(x, np.float32), np.asarray(x, np.float32)
    return arena.put(to_bf16(x), np.uint16), of_bf16(to_bf16(x))


def rounded(x: np.ndarray, dtype: int) -> np.ndarray:
    return x if dtype == FP32 else to_bf16(x)


def array_type(dtype: int) -> type:
    return np.float32 if dtype == FP32 else np.uint16


def fp8_values() -> np.ndarray:
    """Of the codes 0 .. 126 of e4m3, which ascend; code + 128 is the negative, 127 no number."""
    codes = np.arange(127)
    exponents, fractions = codes >> 3, codes & 7
    return np.where(exponents == 0, fractions * 2.0**-9, (8 + fractions) * 2.0 ** (exponents - 10.0))


def to_fp8(x: np.ndarray) -> np.ndarray:
    """Codes: the nearest value, of two as near the even code; what is beyond becomes the largest."""
    values, sizes = fp8_values(), np.abs(x).astype(np.float64)
    above = np.searchsorted(values, sizes).clip(0, 126)
    below = np.maximum(above - 1, 0)
    to_above, to_below = np.abs(values[above] - sizes), np.abs(sizes - values[below])
    nearest = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return (nearest + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def of_fp8(codes: np.ndarray) -> np.ndarray:
    return (fp8_values()[codes & 127] * np.where(codes & 128, -1, 1)).astype(np.float32)


def quantized(x_D: np.ndarray, payload: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a row. A block with a value that is not finite: codes 0, scale NaN."""
    codes, scales = np.zeros(len(x_D), np.uint8), []
    for begin in range(0, len(x_D), 128):
        block = x_D[begin : begin + 128]
        top = np.abs(block).max()  # NaN, if one is
        scale = np.float32(top / np.float32(448.0 if payload == FP8 else 127.0) if np.isfinite(top) else np.nan)
        ratio = block / scale if scale > 0 else np.zeros_like(block)
        if payload == FP8:
            codes[begin : begin + 128] = to_fp8(ratio)
        else:
            codes[begin : begin + 128] = np.clip(np.rint(ratio), -127, 127).astype(np.int8).view(np.uint8)
        scales.append(scale)
    return codes, np.array(scales, np.float32)


def packed_row(x_D: np.ndarray, payload: int, row_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row's bytes, which of them are written, and the values that they stand for."""
    row, is_written, hidden = np.zeros(row_bytes, np.uint8), np.zeros(row_bytes, bool), len(x_D)
    if payload in (FP32, BF16):
        stored_D = np.ascontiguousarray(rounded(x_D, payload))
        row[: stored_D.nbytes], is_written[: stored_D.nbytes] = stored_D.view(np.uint8), True
        return row, is_written, x_D if payload == FP32 else of_bf16(stored_D)
    codes, scales = quantized(x_D, payload)
    scales_at = -(-hidden // 16) * 16
    for begin, part in ((0, codes), (scales_at, scales.view(np.uint8))):
        row[begin : begin + len(part)], is_written[begin : begin + len(part)] = part, True
    decoded = of_fp8(codes) if payload == FP8 else codes.view(np.int8).astype(np.float32)
    return row, is_written, decoded * scales.repeat(128)[:hidden]


def check_payload(library: Checked, seed: int) -> None:
    """Pack, then unpack: each against numpy, bit for bit. For some seeds a row goes to several places."""
    arena = Arena(library, seed)
    rng = arena.rng
    payload, x_kind, out_kind = seed % 4, int(rng.integers(2)), int(rng.integers(2))
    hidden = int(rng.choice([8, 40, 104, 128, 136, 304, 704, 1032, 2056, 4104]))
    num_from, num_rows = int(rng.integers(1, 9)), int(rng.integers(1, 12)) * bool(seed % 9)
    x = rng.standard_normal((num_from, hidden)) * rng.choice([1e-3, 1.0, 100.0], (num_from, 1))
    x[:, : hidden // 2] *= rng.random((num_from, hidden // 2)) ** 8  # small ones too: fp8 has denormals
    x[0, :8] = 0.0
    x[-1] = rng.integers(-1016, 1017, hidden) / 8  # ties, where the scale is 1
    x[-1, ::128] = {FP8: 448.0, INT8: 127.0}.get(payload, 1.0)
    if seed % 3 == 1:
        x[rng.integers(num_from), rng.integers(hidden)] = rng.choice([np.nan, np.inf, -np.inf])
    x_stored, x = stored(arena, x, x_kind)
    index = rng.integers(0, num_from, num_rows)
    given = bool(rng.integers(2))
    if not given:
        num_rows = min(num_rows, num_from)
        index = np.arange(num_rows)
    num_now = int(rng.integers(0, num_rows + 1)) if rng.integers(2) else None
    top_k = int(rng.choice([1, 2, 3, 8, 9, 17]))
    out_rows_TK = rng.permutation(num_rows * top_k).reshape(num_rows, top_k)
    out_rows_TK[rng.random(out_rows_TK.shape) < 0.3] = -1
    is_spread = seed % 3 == 2
    places = out_rows_TK if is_spread else np.arange(num_rows)[:, None]
    row_bytes = library.sg_cuda_payload_bytes(hidden, payload)
    for some_hidden in (hidden, *rng.integers(1, 20_000, 20).tolist()):
        num_scales = -(-some_hidden // 128) * (payload > BF16)
        expected_bytes = sum(-(-part // 16) * 16 for part in (some_hidden * (4, 2, 1, 1)[payload], num_scales * 4))
        assert library.sg_cuda_payload_bytes(some_hidden, payload) == expected_bytes, f"seed {seed}"
    packed = arena.room((places.size, row_bytes), np.uint8)
    expected = packed.copy()
    values = np.zeros((places.size, hidden), np.float32)
    for row in range(num_rows if num_now is None else num_now):
        new, is_written, row_values = packed_row(x[index[row]], payload, row_bytes)
        for place in places[row][places[row] >= 0]:
            expected[place, is_written], values[place] = new[is_written], row_values
    args = structs.Rows(
        x=at(x_stored),
        out=at(packed),
        index_M=at(arena.put(index, np.int32)) if given else None,
        out_rows_TK=at(arena.put(out_rows_TK, np.int32)) if is_spread else None,
        num_now=None if num_now is None else at(arena.put([num_now], np.int32)),
        max_rows=num_rows,
        hidden=hidden,
        top_k=top_k,
        x_kind=x_kind,
        out_kind=payload,
    )
    library.sg_cuda_pack_rows(ctypes.byref(args), None)
    arena.check()
    assert (packed == expected).all(), f"seed {seed}: payload {payload}"
    back = rng.permutation(np.flatnonzero(values.any(1)))
    out = arena.room((len(back), hidden), array_type(out_kind))
    args = structs.Rows(
        x=at(packed), out=at(out), index_M=at(arena.put(back, np.int32)), max_rows=len(back), hidden=hidden
    )
    args.x_kind, args.out_kind = payload, out_kind
    library.sg_cuda_unpack_rows(ctypes.byref(args), None)
    arena.check()
    expected = rounded(values[back], out_kind)
    if out_kind == FP32:  # which NaN a product gives is the machine's own
        assert (np.isnan(out) == np.isnan(expected)).all(), f"seed {seed}"
        out[np.isnan(out)], expected[np.isnan(expected)] = np.nan, np.nan
    assert out.tobytes() == expected.tobytes(), f"seed {seed}"
    args.hidden = hidden + 4
    for refuses in (library.sg_cuda_pack_rows, library.sg_cuda_unpack_rows):
        with pytest.raises(DeviceError, match="must be a multiple of 8"):
            refuses(ctypes.byref(args), None)


def check_combine(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    dtype, hidden = seed % 2, int(rng.choice([8, 16, 264, 2056]))
    num_tokens, top_k = int(rng.integers(0, 9)), int(rng.choice([1, 2, 3, 4, 5, 8, 9, 16, 21, 128]))
    num_rows = num_tokens * top_k + 1
    draws = rng.standard_normal((num_rows, hidden))
    draws[:, 0] = -1e-40  # with small weights a sum of -0, which a row that there is not must leave so
    rows_stored, rows = stored(arena, draws, dtype)
    index_TK = rng.permutation(num_rows)[: num_tokens * top_k].reshape(num_tokens, top_k)
    if seed % 3 == 0:
        index_TK[rng.random(index_TK.shape) < 0.2] = -1
    is_given = seed % 5 != 1
    if not is_given:
        index_TK = np.arange(num_tokens * top_k).reshape(num_tokens, top_k)
    weights_TK = arena.put(rng.random((num_tokens, top_k)) * rng.choice([1, 1e-6], (num_tokens, 1)), np.float32)
    out_TD = arena.room((num_tokens, hidden), np.float32)
    args = structs.Combine(
        rows_ND=at(rows_stored),
        pair_index_TK=at(arena.put(index_TK, np.int32)) if is_given else None,
        weights_TK=at(weights_TK),
        out_TD=at(out_TD),
        num_tokens=num_tokens,
        top_k=top_k,
        hidden=hidden,
        dtype=dtype,
    )
    library.sg_cuda_combine_rows(ctypes.byref(args), None)
    arena.check()
    expected = np.zeros((num_tokens, hidden), np.float32)
    for t in range(num_tokens):
        for k in range(top_k):
            if index_TK[t, k] >= 0:
                product = weights_TK[t, k].astype(np.float64) * rows[index_TK[t, k]]
                expected[t] = (product + expected[t]).astype(np.float32)
    assert out_TD.tobytes() == expected.tobytes(), f"seed {seed}"
    args.hidden = hidden + 4
    with pytest.raises(DeviceError, match="must be a multiple of 8"):
        library.sg_cuda_combine_rows(ctypes.byref(args), None)
    args.hidden, args.top_k = hidden, 129
    with pytest.raises(DeviceError, match="top_k=129 is more than 128"):
        library.sg_cuda_combine_rows(ctypes.byref(args), None)


def check_row_ops(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens, hidden = int(rng.integers(0, 9)), int(rng.choice([8, 136, 1024, 1032, 2048, 3000]))
    dtype = int(rng.integers(2))
    table_stored, table_VD = stored(arena, rng.standard_normal((11, hidden)), dtype)
    ids_T = arena.put(rng.integers(0, 11, num_tokens), np.int64)
    x_TD = arena.room((num_tokens, hidden), np.float32)
    library.sg_cuda_embed(at(table_stored), dtype, at(ids_T), num_tokens, hidden, 1.5, at(x_TD), None)
    assert (x_TD == table_VD[ids_T] * np.float32(1.5)).all(), f"seed {seed}: embed"

    branch_TD = arena.normals(num_tokens, hidden)
    gates_T = arena.normals(num_tokens) if rng.integers(2) else None
    is_sigmoid = int(rng.integers(2))
    x, scale = x_TD.copy(), np.float32(0.22)
    factor = np.ones(num_tokens) if gates_T is None else 1 / (1 + np.exp(-gates_T)) if is_sigmoid else gates_T
    library.sg_cuda_add_branch(at(x_TD), at(branch_TD), at(gates_T), is_sigmoid, scale, num_tokens, hidden, None)
    assert np.allclose(x_TD, x + scale * (factor[:, None] * branch_TD), rtol=1e-5, atol=1e-5), f"seed {seed}: add"
    arena.check()
    wrong = hidden + 4
    with pytest.raises(DeviceError, match=f"embed: hidden={wrong}"):
        library.sg_cuda_embed(at(table_stored), dtype, at(ids_T), num_tokens, wrong, 1.5, at(x_TD), None)
    with pytest.raises(DeviceError, match=f"add_branch: hidden={wrong}"):
        library.sg_cuda_add_branch(at(x_TD), at(branch_TD), None, 0, scale, num_tokens, wrong, None)


def check_rms_norm(library: Checked, seed: int) -> None:
    """With a branch before it or without; each number of lanes that a row may have; then a row alone."""
    arena = Arena(library, seed)
    rng = arena.rng
    num_tokens = int(rng.integers(0, 7))
    hidden = int(rng.choice([8, 136, 1024, 1032, 2048, 8192, 8200] if seed % 6 else [16384, 32768]))
    out_dtype = int(rng.integers(2))
    near = {"rtol": 3e-6, "atol": 1e-6} if out_dtype == FP32 else {"rtol": 8e-3, "atol": 1e-6}
    x_TD, weight_D = arena.normals(num_tokens, hidden), arena.normals(hidden)
    branch_TD = arena.normals(num_tokens, hidden) if rng.integers(2) else None
    before = x_TD.copy()
    out_TD = arena.room((num_tokens, hidden), array_type(out_dtype))
    norm = structs.Norm(
        x_TD=at(x_TD),
        branch_TD=at(branch_TD),
        weight_D=at(weight_D),
        out_TD=at(out_TD),
        num_tokens=num_tokens,
        hidden=hidden,
        multiplier=0.22,
        eps=1e-3,
        out_dtype=out_dtype,
    )
    library.sg_cuda_rms_norm(ctypes.byref(norm), None)
    arena.check()
    x = before if branch_TD is None else before + np.float32(0.22) * branch_TD
    assert x_TD.tobytes() == x.tobytes(), f"seed {seed}: the branch"
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight_D
    found = out_TD if out_dtype == FP32 else of_bf16(out_TD)
    assert np.allclose(found, expected, **near), f"seed {seed}"
    if num_tokens:
        together, t = out_TD.copy(), int(rng.integers(num_tokens))
        x_TD[t], out_TD[t], norm.num_tokens = before[t], 0, 1
        norm.x_TD, norm.out_TD, norm.branch_TD = at(x_TD[t]), at(out_TD[t]), at(branch_TD) and at(branch_TD[t])
        library.sg_cuda_rms_norm(ctypes.byref(norm), None)
        assert (out_TD.tobytes(), x_TD.tobytes()) == (together.tobytes(), x.tobytes()), f"seed {seed}: alone"
    for wrong in (hidden + 4, 32776):
        norm.hidden = wrong
        with pytest.raises(DeviceError, match=f"hidden={wrong}"):
            library.sg_cuda_rms_norm(ctypes.byref(norm), None)
