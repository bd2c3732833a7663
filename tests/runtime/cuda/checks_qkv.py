"""Check of the pass over qkv rows against slow numpy, on random input."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16, to_bf16

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError


def check_qkv(library: Checked, seed: int) -> None:
    """Norms of each head, of all at once and none; clipping; rotation; the cache. Then a row alone."""
    arena = Arena(library, seed)
    rng = arena.rng
    clip = float(rng.choice([0.0, 0.8]))
    num_tokens, kv_heads = int(rng.integers(0, 6)), int(rng.integers(1, 5))
    size = int(rng.choice([8, 256, 8 * int(rng.integers(2, 32)), 8 * int(rng.integers(2, 32))]))
    heads, block_size = kv_heads * int(rng.integers(1, 5)), int(rng.choice([4, 16]))
    num_blocks, num_positions = 5, 50
    qkv_TX = arena.put(rng.standard_normal((num_tokens, (heads + 2 * kv_heads) * size)) * 0.7, np.float32)
    cos, sin = arena.normals(num_positions, size // 2), arena.normals(num_positions, size // 2)
    positions_T = arena.put(rng.integers(0, num_positions, num_tokens), np.int64)
    slots = rng.permutation(num_blocks * block_size)[:num_tokens]
    slots[rng.random(num_tokens) < 0.2] = -1
    if num_tokens and seed % 3 == 0 and 0 not in slots:
        slots[0] = 0
    if num_tokens > 1:
        positions_T[-1] = -1  # there is no such token
    slots_T = arena.put(slots, np.int64)
    caches = [arena.room((num_blocks, kv_heads, block_size, size), np.uint16) for _ in range(2)]
    expected_caches = [cache.copy() for cache in caches]
    q = arena.room((num_tokens, heads, size), np.uint16)
    there = positions_T >= 0
    expected_q = q.copy()
    weights = []
    for number, count in enumerate((heads, kv_heads)):
        kind = (seed + number * int(rng.integers(3))) % 3
        weights.append(None if kind == 0 else arena.normals(size if kind == 1 else count * size))
    args = structs.Qkv(
        qkv_TX=at(qkv_TX),
        q_weight=at(weights[0]),
        k_weight=at(weights[1]),
        positions_T=at(positions_T),
        slots_T=at(slots_T),
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
        q_size=0 if weights[0] is None else len(weights[0]),
        k_size=0 if weights[1] is None else len(weights[1]),
        eps=0.3,
        clip=clip,
    )
    library.sg_cuda_rotate_qkv(ctypes.byref(args), None)
    arena.check()
    rows = qkv_TX.reshape(num_tokens, heads + 2 * kv_heads, size).copy()
    for weight, part in zip(weights, (rows[:, :heads], rows[:, heads : heads + kv_heads]), strict=True):
        if weight is not None:
            wide = part.reshape(num_tokens, part.shape[1] * size // len(weight), len(weight)).astype(np.float64)
            wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.3) * weight
            part[:] = wide.reshape(part.shape)
    if clip:
        rows = np.clip(rows, -np.float32(clip), np.float32(clip))
    one, other = rows[..., : size // 2].astype(np.float64), rows[..., size // 2 :].astype(np.float64)
    c, s = cos[positions_T][:, None], sin[positions_T][:, None]
    # The product that is not in the fma is rounded by itself.
    first = one * c - (rows[..., size // 2 :] * s).astype(np.float64)
    second = other * c + (rows[..., : size // 2] * s).astype(np.float64)
    rotated = to_bf16(np.concatenate([first, second], -1).astype(np.float32))

    def same(found: np.ndarray, expected: np.ndarray, is_normed: bool) -> bool:
        if not is_normed:
            return found.tobytes() == expected.tobytes()
        return bool(np.allclose(of_bf16(found), of_bf16(expected), rtol=8e-3, atol=4e-3))  # of what cancels: fp32

    expected_q[there] = rotated[there, :heads]
    assert same(q, expected_q, weights[0] is not None), f"seed {seed}: q"
    for t in range(num_tokens):
        if slots[t] >= 0 and there[t]:
            block, place = divmod(int(slots[t]), block_size)
            expected_caches[0][block, :, place] = rotated[t, heads : heads + kv_heads]
            expected_caches[1][block, :, place] = to_bf16(rows[t, heads + kv_heads :])
    assert same(caches[0], expected_caches[0], weights[1] is not None), f"seed {seed}: keys"
    assert same(caches[1], expected_caches[1], False), f"seed {seed}: values"
    written = [cache.copy() for cache in caches]
    if num_tokens:
        together, t = q.copy(), int(rng.integers(num_tokens))
        q[t] = q[t] if positions_T[t] < 0 else 0
        args.num_tokens, args.q_THC = 1, at(q[t])
        args.qkv_TX, args.positions_T, args.slots_T = at(qkv_TX[t]), at(positions_T[t:]), at(slots_T[t:])
        library.sg_cuda_rotate_qkv(ctypes.byref(args), None)
        assert q.tobytes() == together.tobytes(), f"seed {seed}: alone"
        assert [cache.tobytes() for cache in caches] == [cache.tobytes() for cache in written], f"seed {seed}: alone"
    for name, value in (("head_size", 12), ("head_size", 264), ("head_size", 0)):
        wrong = structs.Qkv.from_buffer_copy(args)
        setattr(wrong, name, value)
        with pytest.raises(DeviceError, match=name):
            library.sg_cuda_rotate_qkv(ctypes.byref(wrong), None)
    for size_name, weight_name in (("q_size", "q_weight"), ("k_size", "k_weight")):
        wrong = structs.Qkv.from_buffer_copy(args)
        setattr(wrong, size_name, size + 1)
        setattr(wrong, weight_name, at(cos))
        with pytest.raises(DeviceError, match=size_name):
            library.sg_cuda_rotate_qkv(ctypes.byref(wrong), None)
    arena.check()
