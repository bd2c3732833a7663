"""Which tokens attend together: every token once, neighbours only, nothing too large; and the engine's bits without it."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
import torch
from reference_kernels import packing_tokens

from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.cuda.attention import DeviceBatch
from switchgear_runtime.cuda.attention_packing import RUN_MIN, AttentionPacking, Tiles, num_tiles_max
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.step_inputs import InputShape, StepInputs


def draw_tokens(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """(seq_ids_T, positions_T) of a step: of each sequence a run, some of one token."""
    seq_ids: list[int] = []
    positions: list[int] = []
    for seq in range(rng.randrange(5)):
        count = rng.choice([1, 1, 2, 5, 9, 40])
        begin = rng.randrange(3000)
        seq_ids += [seq] * count
        positions += range(begin, begin + count)
    return np.array(seq_ids, np.int32), np.array(positions, np.int64)


def runs_of(seq_ids: np.ndarray, positions: np.ndarray) -> list[range]:
    runs: list[range] = []
    for t in range(len(seq_ids)):
        if t and seq_ids[t] == seq_ids[t - 1] and positions[t] == positions[t - 1] + 1:
            runs[-1] = range(runs[-1].start, t + 1)
        else:
            runs.append(range(t, t + 1))
    return runs


@pytest.mark.parametrize("seed", range(20))
def test_every_token_once(seed: int) -> None:
    rng = random.Random(seed)
    seq_ids, positions = draw_tokens(rng)
    if rng.random() < 0.3 and len(positions) > 3:  # a gap within a sequence
        positions[len(positions) // 2 :] += 7
    most = rng.choice([0, 1, 2, 3, 8, 64])
    found = Tiles.of(seq_ids.tolist(), positions.tolist(), most)
    tiles, alone = found.tiles_N2.tolist(), found.alone_N.tolist()
    runs = [run for run in runs_of(seq_ids, positions) if len(run) >= RUN_MIN and most >= 2]
    in_tiles = {t for run in runs for t in run}
    assert alone == [t for t in range(len(seq_ids)) if t not in in_tiles]
    pieces = [range(first, first + count) for first, count in sorted(tiles)]
    assert [t for piece in pieces for t in piece] == sorted(in_tiles)
    assert len(pieces) <= num_tiles_max(len(seq_ids))
    for run in runs:
        sizes = [len(piece) for piece in pieces if piece.start in run]
        assert len(sizes) == -(-len(run) // most)
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
    lasts = [positions[first] for first, _ in tiles]
    assert lasts == sorted(lasts, reverse=True)


@pytest.mark.parametrize("lengths", [(5, 11), (7, 9), (5, 5, 5, 1), (5,), (4, 4), (3, 2)], ids=str)
def test_room_for_tiles_of_two_tokens(lengths: tuple[int, ...]) -> None:
    seq_ids = [index for index, length in enumerate(lengths) for _ in range(length)]
    positions = [place for length in lengths for place in range(length)]
    assert len(Tiles.of(seq_ids, positions, 2).tiles_N2) <= num_tiles_max(len(seq_ids))


def test_the_example() -> None:
    tiles = Tiles.of([0, 0, 0, 0, 0, 1], [7, 8, 9, 10, 11, 90], 4)
    assert (tiles.tiles_N2.tolist(), tiles.alone_N.tolist()) == ([[2, 3], [0, 2]], [5])


@pytest.mark.parametrize("has_room", [False, True])
def test_padding_attends_alone(has_room: bool) -> None:
    """A step in more room than it needs: every token once, those beyond the last, too, and nothing else."""
    flat = FlatBatch(
        token_ids_T=[1] * 6,
        positions_T=[*range(5), 30],
        seq_ids_T=[0] * 5 + [1],
        slots_T=list(range(6)),
        block_tables_S=[array("i", [0, 0]), array("i", [1, 2])],
        sampling_rows=[],
    )
    tiles = Tiles.of(flat.seq_ids_T, flat.positions_T, 4)
    shape = InputShape(16, 3, 2, 1, num_tiles_max(16), 16) if has_room else InputShape.of(flat, tiles)
    inputs = StepInputs(shape, torch.device("cpu"))
    inputs.fill(flat, [], np.zeros(6, np.int32), 0, None, tiles)
    inputs.on_device.copy_(inputs.host)
    batch = DeviceBatch.of(inputs, 32)
    assert sorted(packing_tokens(batch.packing)) == list(range(shape.num_tokens))
    assert batch.packing.num_alone == shape.num_alone == (16 if has_room else 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_packing_changes_no_bit(seed: int) -> None:
    """Of random steps, through the kernels that the engine calls."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kernels = Kernels("twin", torch.device("cpu"))
    num_heads, num_kv_heads, head_size, block_size = 4, 2, rng.choice([16, 64]), 16
    num_seqs, width = 4, 3100 // block_size
    caches = [torch.randn(num_seqs * width, num_kv_heads, block_size, head_size, generator=generator) for _ in range(2)]
    k_cache, v_cache = (cache.bfloat16() for cache in caches)
    tables = torch.randperm(num_seqs * width, generator=generator).int().view(num_seqs, width)
    seq_ids, positions = draw_tokens(rng)
    q_THC = torch.randn(len(seq_ids), num_heads, head_size, generator=generator).bfloat16()
    window = rng.choice([0, 100])
    packings = [AttentionPacking(num_alone=len(seq_ids), max_positions=3100)]
    for most in (kernels.size("attention_tile", num_heads, num_kv_heads, head_size), 3):
        tiles = Tiles.of(seq_ids.tolist(), positions.tolist(), most)
        packings.append(
            AttentionPacking(
                tiles_N2=torch.from_numpy(tiles.tiles_N2),
                alone_N=torch.from_numpy(tiles.alone_N),
                num_alone=len(tiles.alone_N),
                max_positions=3100,
            )
        )
    outs = [
        kernels.paged_attention(
            q_THC,
            k_cache,
            v_cache,
            block_tables_QB=tables,
            seq_ids_T=torch.from_numpy(seq_ids),
            positions_T=torch.from_numpy(positions),
            packing=packing,
            scale=head_size**-0.5,
            sliding_window=window,
        )
        for packing in packings
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)
