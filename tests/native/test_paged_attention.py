"""paged_attention: against the twin; prefill, chunks and decode give the same bits, whatever the block size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switchgear_runtime import ops, ops_reference


@dataclass
class Case:
    """Sequences of random lengths whose K and V are already in a shuffled paged cache."""

    q_THC: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables_SB: Tensor
    seq_ids_T: Tensor
    positions_T: Tensor
    lengths: list[int]
    sliding_window: int
    sinks_H: Tensor | None

    def run(self, rows: Tensor | None = None, op: Callable[..., Tensor] = ops.paged_attention) -> Tensor:
        rows = torch.arange(self.q_THC.shape[0]) if rows is None else rows
        return op(
            self.q_THC[rows].contiguous(),
            self.k_cache,
            self.v_cache,
            self.block_tables_SB,
            self.seq_ids_T[rows].contiguous(),
            self.positions_T[rows].contiguous(),
            self.q_THC.shape[2] ** -0.5,
            self.sliding_window,
            self.sinks_H,
        )


def make_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    lengths: tuple[int, ...] = (1, 16, 17, 52),
    sliding_window: int = 0,
    sinks: bool = False,
) -> Case:
    torch.manual_seed(seed)
    num_tokens = sum(lengths)
    # Drawn before anything that depends on the block size, so that cases differing in it alone hold the same values.
    q, k, v = (torch.randn(num_tokens, h, head_size) for h in (heads, kv_heads, kv_heads))
    sinks_H = torch.randn(heads) if sinks else None
    blocks_of = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks_of) + 3)
    tables = torch.full((len(lengths), max(blocks_of)), -1, dtype=torch.int32)
    shape = (len(order), kv_heads, block_size, head_size)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]  # what is not written must not be read
    used, slots, positions, seq_ids = 0, [], [], []
    for s, length in enumerate(lengths):
        tables[s, : blocks_of[s]] = order[used : used + blocks_of[s]].to(torch.int32)
        used += blocks_of[s]
        for p in range(length):
            slots.append(int(tables[s, p // block_size]) * block_size + p % block_size)
            positions.append(p)
            seq_ids.append(s)
    ops.write_kv(k, v, caches[0], caches[1], torch.tensor(slots))
    return Case(
        q,
        caches[0],
        caches[1],
        tables,
        torch.tensor(seq_ids, dtype=torch.int32),
        torch.tensor(positions),
        list(lengths),
        sliding_window,
        sinks_H,
    )


VARIANTS = [
    {},
    {"dtype": torch.float32},
    {"heads": 8, "kv_heads": 1, "head_size": 128},
    {"heads": 3, "kv_heads": 3, "head_size": 18, "dtype": torch.float32},
    {"block_size": 64},
    {"block_size": 5},
    {"sliding_window": 20},
    {"sliding_window": 1, "block_size": 7},
    {"sinks": True},
    {"sinks": True, "sliding_window": 33, "heads": 6, "kv_heads": 2, "head_size": 80},
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_equals_twin(variant: int, same_bits_everywhere: Callable[..., None]) -> None:
    case = make_case(variant, **VARIANTS[variant])  # type: ignore[arg-type]
    error = (case.run() - case.run(op=ops_reference.paged_attention)).abs().max().item()
    assert error < 2e-6
    same_bits_everywhere(case.run)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_prefill_chunks_and_decode_give_the_same_bits(variant: int) -> None:
    case = make_case(100 + variant, **VARIANTS[variant])  # type: ignore[arg-type]
    whole = case.run()
    num_tokens = whole.shape[0]
    for row in range(num_tokens):  # decode
        assert torch.equal(case.run(torch.tensor([row]))[0], whole[row]), f"row {row} alone"
    generator = torch.Generator().manual_seed(variant)
    for _ in range(5):  # chunks: random cuts; then random rows in random order, as batch mates
        start, end = sorted(torch.randint(0, num_tokens + 1, (2,), generator=generator).tolist())
        rows = torch.arange(start, end)
        assert torch.equal(case.run(rows), whole[rows]), f"rows {start} to {end}"
        rows = torch.randperm(num_tokens, generator=generator)[:40]
        assert torch.equal(case.run(rows), whole[rows])


def test_block_size_changes_no_bit() -> None:
    expected = make_case(7).run()
    for block_size in (1, 5, 32, 128):
        assert torch.equal(make_case(7, block_size=block_size).run(), expected), f"block_size={block_size}"


def test_large_scores_do_not_overflow() -> None:
    case = make_case(3, dtype=torch.float32)
    case.q_THC *= 1000
    got = case.run()
    assert (got - case.run(op=ops_reference.paged_attention)).abs().max() < 1e-3
    assert got.isfinite().all()


def test_long_context_stays_accurate() -> None:
    case = make_case(4, dtype=torch.float32, heads=2, kv_heads=1, lengths=(1500,))
    last = torch.tensor([1499, 777])
    assert (case.run(last) - case.run(last, op=ops_reference.paged_attention)).abs().max() < 1e-6


def test_bad_indices_raise() -> None:
    case = make_case(5)
    assert case.run(torch.tensor([], dtype=torch.int64)).shape == (0, 4, 64)
    case.positions_T[3] = 16 * case.block_tables_SB.shape[1]
    with pytest.raises(ValueError, match=r"positions_T\[3\]"):
        case.run()
    case.positions_T[3] = -1
    with pytest.raises(ValueError, match=r"positions_T\[3\]=-1"):
        case.run()
    case = make_case(5)
    case.seq_ids_T[2] = 4
    with pytest.raises(ValueError, match=r"seq_ids_T\[2\]=4"):
        case.run()
    case = make_case(5)
    case.positions_T[0] = 20  # the first sequence has one block; the table holds -1 beyond it
    with pytest.raises(ValueError, match=r"block_tables_SB\[0, 1\]=-1"):
        case.run()
    case.q_THC = case.q_THC[:, :3].contiguous()
    with pytest.raises(ValueError, match="3 heads"):
        case.run()
