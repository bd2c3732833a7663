"""Checks of rotary positions, the cache write and paged attention against slow numpy, on random input."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16
from checks_rows import array_type, rounded, stored

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import FP32, DeviceError


def check_rope_kv(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    dtype, clip = seed % 2, float(rng.choice([0.0, 0.8]))
    num_tokens, kv_heads = int(rng.integers(0, 9)), int(rng.integers(1, 4))
    heads, size, block_size = kv_heads * int(rng.integers(1, 4)), 2 * int(rng.integers(1, 40)), int(rng.choice([4, 16]))
    num_blocks, num_positions = 5, 50
    qkv_TX = arena.normals(num_tokens, (heads + 2 * kv_heads) * size)
    cos, sin = arena.normals(num_positions, size // 2), arena.normals(num_positions, size // 2)
    positions_T = arena.put(rng.integers(0, num_positions, num_tokens), np.int64)
    slots = rng.permutation(num_blocks * block_size)[:num_tokens]
    slots[rng.random(num_tokens) < 0.2] = -1
    if num_tokens and seed % 3 == 0 and 0 not in slots:
        slots[0] = 0
    caches = [arena.room((num_blocks, kv_heads, block_size, size), array_type(dtype)) for _ in range(2)]
    expected_caches = [cache.copy() for cache in caches]
    q = arena.room((num_tokens, heads, size), array_type(dtype))
    args = structs.Kv(
        qkv_TX=at(qkv_TX),
        positions_T=at(positions_T),
        slots_T=at(arena.put(slots, np.int64)),
        cos_PC2=at(cos),
        sin_PC2=at(sin),
        k_cache=at(caches[0]),
        v_cache=at(caches[1]),
        q_THC=at(q),
        num_tokens=num_tokens,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        block_size=block_size,
        clip=clip,
        dtype=dtype,
    )
    library.sg_cuda_rope_kv(ctypes.byref(args), None)
    arena.check()
    rows = qkv_TX.reshape(num_tokens, heads + 2 * kv_heads, size)
    if clip:
        rows = np.clip(rows, -np.float32(clip), np.float32(clip))
    one, other = rows[..., : size // 2].astype(np.float64), rows[..., size // 2 :].astype(np.float64)
    c, s = cos[positions_T][:, None], sin[positions_T][:, None]
    # The product that is not in the fma is rounded by itself.
    first = one * c - (rows[..., size // 2 :] * s).astype(np.float64)
    second = other * c + (rows[..., : size // 2] * s).astype(np.float64)
    rotated = rounded(np.concatenate([first, second], -1).astype(np.float32), dtype)
    assert (q == rotated[:, :heads]).all(), f"seed {seed}: q"
    for t in range(num_tokens):
        if slots[t] >= 0:
            block, place = divmod(int(slots[t]), block_size)
            expected_caches[0][block, :, place] = rotated[t, heads : heads + kv_heads]
            expected_caches[1][block, :, place] = rounded(rows[t, heads + kv_heads :], dtype)
    for cache, expected in zip(caches, expected_caches, strict=True):
        assert cache.tobytes() == expected.tobytes(), f"seed {seed}: cache"


def check_attention(library: Checked, seed: int) -> None:
    """Several sequences and positions, a sliding window, sinks, one part and several; then each token alone."""
    arena = Arena(library, seed)
    rng = arena.rng
    dtype, out_dtype = seed % 2, int(rng.integers(2))
    long = seed % 5 == 4  # several parts of 256 positions
    kv_heads = int(rng.integers(1, 3))
    heads, size, block_size = kv_heads * int(rng.integers(1, 7)), int(rng.choice([2, 24, 40])), int(rng.choice([4, 16]))
    num_seqs, table_width = (
        int(rng.integers(1, 4)),
        (int(rng.choice([300, 1500])) if long else int(rng.integers(1, 90))) // block_size + 1,
    )
    num_blocks = num_seqs * table_width
    limit = table_width * block_size
    tables = arena.put(rng.permutation(num_blocks).reshape(num_seqs, table_width), np.int32)
    k = rng.standard_normal((num_blocks, kv_heads, block_size, size))
    if long:  # a part whose scores are far below the others'
        k[tables[:, : 256 // block_size]] *= 0.01
    k_stored, k = stored(arena, k, dtype)
    v_stored, v = stored(arena, rng.standard_normal((num_blocks, kv_heads, block_size, size)), dtype)
    num_tokens = int(rng.integers(1, 4 if long else 7))
    seq_ids = arena.put(rng.integers(0, num_seqs, num_tokens), np.int32)
    positions = arena.put(rng.integers(limit // 2 if long else 0, limit, num_tokens), np.int64)
    window = int(rng.choice([0, 1, 40, 270]))
    if 0 < window < limit and seed % 3 == 0:
        positions[0] = window  # the first that does not see position 0
    if seed % 3 == 1:
        positions[-1], seq_ids[-1] = limit - 1, num_seqs - 1  # the last of all
    sinks = arena.normals(heads) if rng.integers(2) else None
    q_stored, q = stored(arena, rng.standard_normal((num_tokens, heads, size)) * rng.choice([2, 60]), dtype)
    out = arena.room((num_tokens, heads, size), array_type(out_dtype))
    work = arena.room(library.sg_cuda_attention_work(num_tokens, heads, size, limit), np.float32)
    args = structs.Attention(
        q_THC=at(q_stored),
        k_cache=at(k_stored),
        v_cache=at(v_stored),
        block_tables_QB=at(tables),
        seq_ids_T=at(seq_ids),
        positions_T=at(positions),
        sinks_H=at(sinks),
        out_THC=at(out),
        work=at(work),
        num_tokens=num_tokens,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        block_size=block_size,
        table_width=table_width,
        max_positions=limit,
        sliding_window=window,
        scale=size**-0.5,
        dtype=dtype,
        out_dtype=out_dtype,
    )
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    found = out if out_dtype == FP32 else of_bf16(out)
    near = {"rtol": 1e-4, "atol": 2e-5} if out_dtype == FP32 else {"rtol": 8e-3, "atol": 1e-4}
    for t in range(num_tokens):
        last = int(positions[t])
        first = max(0, last - window + 1) if window else 0
        for head in range(heads):
            group = head // (heads // kv_heads)
            keys, values = (
                cache[tables[seq_ids[t]], group].reshape(-1, size)[first : last + 1].astype(np.float64)
                for cache in (k, v)
            )
            scores = keys @ q[t, head].astype(np.float64) * np.float32(size**-0.5)
            powers = np.exp(scores - scores.max())
            total = powers.sum() + (0.0 if sinks is None else np.exp(sinks[head] - scores.max()))
            assert np.allclose(found[t, head], powers @ values / total, **near), f"seed {seed}: token {t}, head {head}"
    together = out.copy()
    args.work = None
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    assert out.tobytes() == together.tobytes(), f"seed {seed}: part after part"
    args.work = at(work)
    many = -(-70 // num_tokens)  # copies of the tokens: too many for parts side by side
    more = arena.room((many * num_tokens, heads, size), array_type(out_dtype))
    repeated = [arena.put(np.concatenate([one] * many), one.dtype) for one in (q_stored, seq_ids, positions)]
    args.q_THC, args.seq_ids_T, args.positions_T = (at(one) for one in repeated)
    args.out_THC, args.num_tokens = at(more), many * num_tokens
    if not long or seed % 10 == 4:
        assert library.sg_cuda_attention_work(many * num_tokens, heads, size, limit) == 0
        library.sg_cuda_paged_attention(ctypes.byref(args), None)
        assert more.tobytes() == together.tobytes() * many, f"seed {seed}: many"
    token = int(rng.integers(num_tokens))
    args.q_THC, args.seq_ids_T, args.positions_T = at(q_stored[token]), at(seq_ids[token:]), at(positions[token:])
    args.out_THC, args.num_tokens = at(out[token]), 1
    args.max_positions = int(positions[token]) + 1  # fewer parts, the same bits
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    assert out.tobytes() == together.tobytes(), f"seed {seed}: alone"
    for num_kv_heads in (0, heads + 1):
        args.num_kv_heads = num_kv_heads
        with pytest.raises(DeviceError):
            library.sg_cuda_paged_attention(ctypes.byref(args), None)
