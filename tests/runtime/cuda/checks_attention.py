"""Checks of paged attention against slow numpy, on random input."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from arena import Arena, Checked, at, of_bf16, to_bf16
from checks_rows import array_type

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import ATTENTION_ROWS, BF16, FP32, DeviceError

NAN = 0x7FC0  # as bf16
WORK_MAX = 64 << 20  # floats


@dataclass
class Scene:
    """Sequences in a cache, and tokens at the end of them: of each a run of neighbours."""

    arena: Arena
    heads: int
    kv_heads: int
    size: int
    block_size: int
    window: int
    tables: np.ndarray
    k: np.ndarray  # as stored
    v: np.ndarray
    seq_ids: np.ndarray
    positions: np.ndarray
    runs: list[tuple[int, int]]  # first token, tokens
    q: np.ndarray
    sinks: np.ndarray | None
    args: structs.Attention

    @classmethod
    def draw(cls, library: Checked, seed: int, out_dtype: int) -> Scene:
        arena = Arena(library, seed)
        rng = arena.rng
        is_long, is_wide = seed % 8 == 7, seed % 4 == 1  # long: where parts become twice as large
        kv_heads = 1 if is_long or is_wide else int(rng.integers(1, 3))
        size = int(rng.choice([136, 200, 256] if is_wide else [8, 64] if is_long else [8, 24, 64, 72, 128]))
        each = (1, 2, 5)[seed % 3] if size > 64 or is_long else (16, 1, 8, 18, 3)[seed % 5]
        heads = kv_heads * each
        block_size, num_seqs = int(rng.choice([4, 16, 48])), 1 if is_long else int(rng.integers(1, 4))
        limit = 8200 if is_long else int(rng.choice([90, 300] if is_wide else [90, 300, 700]))
        width = limit // block_size + 1
        limit = width * block_size
        tables = arena.put(rng.permutation(num_seqs * width).reshape(num_seqs, width), np.int32)
        shape = (num_seqs * width, kv_heads, block_size, size)
        k, v = (to_bf16(rng.standard_normal(shape)) for _ in range(2))
        window = int(rng.choice([0, 0, 1, 40, 270]))
        seq_ids, positions, runs = [], [], []
        for seq in rng.permutation(num_seqs):
            count = int(rng.integers(2, 5)) if is_long else int(rng.integers(1, 9))
            # The last of all, the first of all, the first that does not see position 0, or any.
            last = int(rng.choice([limit - 1, count - 1, window + rng.integers(count), rng.integers(count - 1, limit)]))
            last = min(max(last, count - 1), limit - 1)
            if is_long:
                last = 8191 + int(rng.integers(0, count))
            runs.append((len(positions), count))
            seq_ids += [seq] * count
            positions += range(last - count + 1, last + 1)
            table = tables[seq]
            behind = np.arange(last + 1, limit)
            for cache in (k, v):
                cache[table[behind // block_size], :, behind % block_size] = NAN  # no position yet: never read
        scene = cls(
            arena=arena,
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            block_size=block_size,
            window=window,
            tables=tables,
            k=arena.put(k, np.uint16),
            v=arena.put(v, np.uint16),
            seq_ids=arena.put(seq_ids, np.int32),
            positions=arena.put(positions, np.int64),
            runs=runs,
            q=arena.room((len(positions), heads, size), np.uint16),
            sinks=arena.put(rng.standard_normal(heads) * 4, np.float32) if seed % 4 < 3 else None,
            args=structs.Attention(),
        )
        scene._ask()
        scene._fill(limit, out_dtype)
        return scene

    def _ask(self) -> None:
        """Queries, many of which look for one position: the first that is seen, the last, one beside, one at an edge."""
        rng = self.arena.rng
        for t, last in enumerate(self.positions.tolist()):
            first = self.first(last)
            places = [first, last, first - 1, last + 1, last // 64 * 64, last // 256 * 256 - 1, last // 256 * 256]
            for head in range(self.heads):
                place = int(rng.choice([*places, int(rng.integers(first, last + 1))]))
                row = rng.standard_normal(self.size) * rng.choice([1.0, 20.0])
                if 0 <= place <= self.newest(t) and rng.integers(4):
                    row = of_bf16(self.row(self.k, t, head, place)) * rng.choice([3.0, 30.0])
                self.q[t, head] = to_bf16(row)

    def first(self, last: int) -> int:
        return max(0, last - self.window + 1) if self.window else 0

    def newest(self, token: int) -> int:
        """The last position of the token's sequence."""
        return int(self.positions[self.seq_ids == self.seq_ids[token]].max())

    def row(self, cache: np.ndarray, token: int, head: int, positions: int | np.ndarray) -> np.ndarray:
        table = self.tables[self.seq_ids[token]]
        group = head // (self.heads // self.kv_heads)
        return cache[table[positions // self.block_size], group, positions % self.block_size]

    def _fill(self, limit: int, out_dtype: int) -> None:
        self.args = structs.Attention(
            q_THC=at(self.q),
            k_cache=at(self.k),
            v_cache=at(self.v),
            block_tables_QB=at(self.tables),
            seq_ids_T=at(self.seq_ids),
            positions_T=at(self.positions),
            sinks_H=at(self.sinks),
            done=at(self.arena.put(np.zeros(ATTENTION_ROWS), np.int32)),
            num_alone=len(self.positions),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.size,
            block_size=self.block_size,
            table_width=self.tables.shape[1],
            max_positions=limit,
            sliding_window=self.window,
            scale=self.size**-0.5,
            out_dtype=out_dtype,
        )

    def expected(self, t: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """The result, and how far weights that are rounded to bf16 (in both sums) may take it."""
        last = int(self.positions[t])
        seen = np.arange(self.first(last), last + 1)
        keys, values = (of_bf16(self.row(cache, t, head, seen)).astype(np.float64) for cache in (self.k, self.v))
        scores = keys @ of_bf16(self.q[t, head]).astype(np.float64) * np.float32(self.size**-0.5)
        sink = -np.inf if self.sinks is None else float(self.sinks[head])
        powers = np.exp(scores - max(scores.max(), sink))
        total = powers.sum() + np.exp(sink - max(scores.max(), sink))
        return powers @ values / total, 2**-8 * (powers @ np.abs(values)) / total

    def tiles(self, most: int) -> list[tuple[int, int]]:
        """The runs in pieces of at most `most` tokens."""
        pieces = []
        for first, count in self.runs:
            while count:
                piece = int(self.arena.rng.integers(1, min(most, count) + 1))
                pieces.append((first, piece))
                first, count = first + piece, count - piece
        return pieces


def check_attention(library: Checked, seed: int) -> None:
    """Each token against numpy; then the same bits part after part, in tiles, and alone in another cache."""
    out_dtype = (FP32, BF16)[seed % 2]
    scene = Scene.draw(library, seed, out_dtype)
    arena, rng, args = scene.arena, scene.arena.rng, scene.args
    num_tokens = len(scene.positions)
    out = arena.room((num_tokens, scene.heads, scene.size), array_type(out_dtype))
    untouched = out.copy()
    sizes = (scene.heads, scene.kv_heads, scene.size)
    work = arena.room(library.sg_cuda_attention_work(num_tokens, *sizes, args.max_positions), np.float32)
    args.out_THC, args.work = at(out), at(work)
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    found = out if out_dtype == FP32 else of_bf16(out)
    for t in range(num_tokens):
        for head in range(scene.heads):
            expected, bound = scene.expected(t, head)
            bound = bound + 2e-4 * np.abs(expected).max() + (2**-8 * np.abs(expected) if out_dtype == BF16 else 0)
            assert (np.abs(found[t, head] - expected) <= bound).all(), f"seed {seed}: token {t}, head {head}"
    together = out.copy()
    args.work = None
    out[:] = untouched
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    assert out.tobytes() == together.tobytes(), f"seed {seed}: part after part"

    most = library.sg_cuda_attention_tile(*sizes)
    pieces = scene.tiles(max(1, most))
    tiles = [piece for piece in pieces if most >= 2 and (piece[1] > 1 or rng.integers(2))]
    alone = [first + i for first, count in pieces if (first, count) not in tiles for i in range(count)]
    tiles += [(0, 0)] * int(rng.integers(2))  # room for more than there are
    alone += [-1] * int(rng.integers(3))
    rng.shuffle(tiles)
    rng.shuffle(alone)
    missing = alone[0] if alone and alone[0] >= 0 else None
    if missing is not None:
        position, scene.positions[missing] = scene.positions[missing], -1
    args.tiles_N2, args.num_tiles = at(arena.put(np.array(tiles, np.int32).reshape(-1, 2), np.int32)), len(tiles)
    args.alone_N, args.num_alone = at(arena.put(alone, np.int32)), len(alone)
    args.work = at(arena.room(library.sg_cuda_attention_work(len(alone), *sizes, args.max_positions), np.float32))
    out[:] = untouched
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    if missing is not None:
        scene.positions[missing] = position
        assert out[missing].tobytes() == untouched[missing].tobytes(), f"seed {seed}: a token that is not there"
        out[missing] = together[missing]
    assert out.tobytes() == together.tobytes(), f"seed {seed}: tiles"

    token = int(rng.integers(num_tokens))
    last = int(scene.positions[token])
    unseen = np.r_[0 : scene.first(last), last + 1 : args.max_positions]
    for cache in (scene.k, scene.v):  # nothing that it does not see is read
        cache[scene.tables[scene.seq_ids[token]][unseen // scene.block_size], :, unseen % scene.block_size] = NAN
    args.alone_N, args.num_alone, args.num_tiles = at(arena.put([token], np.int32)), 1, 0
    args.max_positions = last + 1  # fewer parts, the same bits
    args.work = at(arena.room(library.sg_cuda_attention_work(1, *sizes, args.max_positions), np.float32))
    out[token] = untouched[token]
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    assert out.tobytes() == together.tobytes(), f"seed {seed}: alone"
    assert not np.frombuffer((ctypes.c_int32 * ATTENTION_ROWS).from_address(args.done), np.int32).any(), f"seed {seed}"
    for name, value in (
        ("num_kv_heads", 0),
        ("num_kv_heads", scene.heads + 1),
        ("head_size", 12),
        ("head_size", 0),
        ("head_size", 264),
        ("out_dtype", 2),
        ("scale", 0.0),
    ):
        wrong = structs.Attention.from_buffer_copy(args)
        setattr(wrong, name, value)
        with pytest.raises(DeviceError, match=name):
            library.sg_cuda_paged_attention(ctypes.byref(wrong), None)


def check_attention_sizes(library: Checked, seed: int) -> None:
    """Of tiles, and of work memory: it is enough for every part, and there is none where many rows need none."""
    rng = np.random.default_rng(seed)
    kv_heads, size = int(rng.integers(1, 9)), 8 * int(rng.integers(1, 33))
    each = int(rng.integers(1, 40))
    rows = 64 if size <= 128 else 32
    assert library.sg_cuda_attention_tile(kv_heads * each, kv_heads, size) == rows // each
    per_token = kv_heads * (-(-each // 16))
    most = ATTENTION_ROWS // per_token
    for num_tokens in (0, 1, most, most + 1):
        for max_positions in (0, 1, 256, 257, 8192, 8193, 100_000):
            parts = min(32, -(-max_positions // 256))
            floats = num_tokens * kv_heads * each * parts * (size + 4)
            floats *= parts > 1 and num_tokens <= most and floats <= WORK_MAX
            found = library.sg_cuda_attention_work(num_tokens, kv_heads * each, kv_heads, size, max_positions)
            assert found == floats, f"seed {seed}"


def check_many_alone(library: Checked, seed: int) -> None:
    """More rows than have parts side by side: whatever the work memory, the bits of fewer tokens at a time."""
    arena = Arena(library, seed)
    rng = arena.rng
    kv_heads, size, block_size = int(rng.integers(1, 3)), 8, 16
    num_tokens = ATTENTION_ROWS // kv_heads + int(rng.integers(1, 9))
    limit = 576  # three parts
    tables = arena.put(rng.permutation(limit // block_size).reshape(1, -1), np.int32)
    k, v = (
        arena.put(to_bf16(rng.standard_normal((limit // block_size, kv_heads, block_size, size))), np.uint16)
        for _ in range(2)
    )
    q = arena.put(to_bf16(rng.standard_normal((num_tokens, kv_heads, size))), np.uint16)
    positions = arena.put(rng.integers(limit - 60, limit, num_tokens), np.int64)
    outs = [arena.room((num_tokens, kv_heads, size), np.uint16) for _ in range(2)]
    args = _of_one_sequence(arena, q, k, v, tables, positions, sliding_window=90)  # two parts at most: one for many
    args.out_THC, args.work = at(outs[0]), at(arena.room(4, np.float32))
    library.sg_cuda_paged_attention(ctypes.byref(args), None)
    for first in range(0, num_tokens, 1500):
        alone = np.arange(first, min(first + 1500, num_tokens))
        floats = library.sg_cuda_attention_work(len(alone), kv_heads, kv_heads, size, limit)
        args.alone_N, args.num_alone = at(arena.put(alone, np.int32)), len(alone)
        args.out_THC, args.work = at(outs[1]), at(arena.room(floats, np.float32))
        library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    assert outs[0].tobytes() == outs[1].tobytes(), f"seed {seed}"


def check_many_parts(library: Checked, seed: int) -> None:
    """More parts than the loads of a merge take at once: with work memory the bits of a block that has them all."""
    arena = Arena(library, seed)
    rng = arena.rng
    size, block_size, num_tokens = 8, 16, 4
    limit = 256 * (8 + seed)  # parts
    tables = arena.put(rng.permutation(limit // block_size).reshape(1, -1), np.int32)
    k, v = (
        arena.put(to_bf16(rng.standard_normal((limit // block_size, 1, block_size, size))), np.uint16) for _ in range(2)
    )
    q = arena.put(to_bf16(rng.standard_normal((num_tokens, 1, size))), np.uint16)
    positions = arena.put(limit - 1 - rng.integers(0, 250, num_tokens), np.int64)
    outs = [arena.room((num_tokens, 1, size), np.uint16) for _ in range(2)]
    floats = library.sg_cuda_attention_work(num_tokens, 1, 1, size, limit)
    assert floats > 0
    for out, work in zip(outs, (None, arena.room(floats, np.float32)), strict=True):
        args = _of_one_sequence(arena, q, k, v, tables, positions)
        args.out_THC, args.work = at(out), at(work)
        library.sg_cuda_paged_attention(ctypes.byref(args), None)
    arena.check()
    assert outs[0].tobytes() == outs[1].tobytes(), f"seed {seed}"


def _of_one_sequence(
    arena: Arena,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    tables: np.ndarray,
    positions: np.ndarray,
    *,
    sliding_window: int = 0,
) -> structs.Attention:
    """Of tokens that all attend alone, as many heads as KV heads; without `out_THC` and `work`."""
    num_tokens, num_heads, size = q.shape
    block_size = k.shape[2]
    return structs.Attention(
        q_THC=at(q),
        k_cache=at(k),
        v_cache=at(v),
        block_tables_QB=at(tables),
        seq_ids_T=at(arena.put(np.zeros(num_tokens), np.int32)),
        positions_T=at(positions),
        done=at(arena.put(np.zeros(ATTENTION_ROWS), np.int32)),
        num_alone=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=size,
        block_size=block_size,
        table_width=tables.shape[1],
        max_positions=block_size * tables.shape[1],
        sliding_window=sliding_window,
        scale=0.3,
        out_dtype=BF16,
    )
