"""paged_attention: against the twin; prefill, chunks and decode give the same bits, whatever the block size.

Tolerance over a bf16 cache: the native op rounds each weight to bf16, once above and once below the fraction bar, so an
output is within 2^-8 of the same average of absolute values.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
    {"block_size": 64, "lengths": (70, 130, 1)},
    {"block_size": 48, "lengths": (49, 200)},
    {"block_size": 5, "dtype": torch.float32},
    {"sliding_window": 20, "lengths": (1, 16, 66, 130)},
    {"sliding_window": 1, "block_size": 48},
    {"sliding_window": 1, "block_size": 7, "dtype": torch.float32},
    {"sinks": True},
    {"sinks": True, "sliding_window": 33, "heads": 6, "kv_heads": 2, "head_size": 80},
    {"heads": 3, "kv_heads": 3, "head_size": 18, "lengths": (3, 90)},
    {"heads": 10, "kv_heads": 2, "head_size": 112, "sliding_window": 65, "lengths": (129,)},
    {"heads": 2, "kv_heads": 1, "head_size": 2, "lengths": (1, 2, 70)},
]


def assert_near_twin(case: Case, rows: Tensor | None = None) -> None:
    """A weight is off by at most 2^-8 of itself, in the sum over values and in the sum that divides it: so of an output
    by 2^-8 of the mean of |v| and of |output|. (Without a sink the largest weight is 1, and exact.)"""
    exact = case.run(rows, op=ops_reference.paged_attention)
    error = (case.run(rows) - exact).abs()
    if case.k_cache.dtype == torch.float32:
        assert error.max().item() < 2e-6
        return
    absolute = ops_reference.pack_v(ops_reference.unpack_v(case.v_cache).abs())
    bound = (case.run(rows, op=partial(attend_values, absolute)) + exact.abs()) * 1.01 / 256 + 1e-6
    assert (error / bound).max().item() < 1.0


def attend_values(values: Tensor, q_THC: Tensor, k_cache: Tensor, _v_cache: Tensor, *rest: Any) -> Tensor:
    """The twin over other values."""
    return ops_reference.paged_attention(q_THC, k_cache, values, *rest)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_equals_twin(variant: int, same_bits_everywhere: Callable[..., None]) -> None:
    case = make_case(variant, **VARIANTS[variant])  # type: ignore[arg-type]
    assert_near_twin(case)
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


@pytest.mark.parametrize("sliding_window", [0, 37])
@pytest.mark.parametrize(
    ("dtype", "block_sizes"), [(torch.float32, (1, 5, 32, 128)), (torch.bfloat16, (32, 48, 64, 128))]
)
def test_block_size_changes_no_bit(dtype: torch.dtype, block_sizes: tuple[int, ...], sliding_window: int) -> None:
    variant: dict[str, Any] = {"dtype": dtype, "lengths": (1, 16, 17, 150), "sliding_window": sliding_window}
    expected = make_case(7, **variant).run()
    for block_size in block_sizes:
        got = make_case(7, block_size=block_size, **variant).run()
        assert torch.equal(got, expected), f"block_size={block_size}"


def test_random_shapes() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    for _ in range(8):
        kv_heads = rng.choice([1, 2, 3])
        variant: dict[str, Any] = {
            "kv_heads": kv_heads,
            "heads": kv_heads * rng.choice([1, 2, 4, 5, 7, 12]),
            "head_size": rng.choice([2, 16, 30, 32, 64, 66, 96, 160]),
            "block_size": rng.choice([16, 32, 48, 64, 128]),
            "lengths": tuple(rng.randint(1, 140) for _ in range(rng.randint(1, 3))),
            "sliding_window": rng.choice([0, 0, 1, 2, 17, 64, 70]),
            "sinks": rng.random() < 0.5,
        }
        label = f"seed={seed} {variant}"
        case = make_case(rng.randrange(1 << 32), **variant)
        whole = case.run()
        for _ in range(6):
            rows = torch.tensor(rng.sample(range(whole.shape[0]), min(whole.shape[0], rng.choice([1, 7, 30]))))
            assert torch.equal(case.run(rows), whole[rows]), label
        assert_near_twin(case, torch.tensor(rng.sample(range(whole.shape[0]), min(whole.shape[0], 12))))


def test_errors_are_roundings() -> None:
    """Over many weights they cancel: far below the worst case, which a lost position might hide under."""
    case = make_case(15, lengths=(300,))
    rows = torch.arange(200, 300)
    exact = case.run(rows, op=ops_reference.paged_attention)
    assert (case.run(rows) - exact).square().mean().sqrt() < 2e-3 * exact.square().mean().sqrt()


@pytest.mark.parametrize("position", [0, 1, 15, 16, 62, 63, 64, 65, 100, 149])
def test_every_position_is_found(position: int) -> None:
    case = make_case(11, lengths=(150,), heads=2, kv_heads=1)
    k, v = (unpack(cache)[case.block_tables_SB[0].long(), 0].flatten(0, 1) for unpack, cache in
            ((ops_reference.unpack_k, case.k_cache), (ops_reference.unpack_v, case.v_cache)))  # fmt: skip
    case.q_THC[149] = 20 * k[position].float()
    assert (case.run(torch.tensor([149]))[0] - v[position].float()).abs().max() < 1e-5


def test_other_tokens_values_stay_out() -> None:
    """Infinities and NaN at later positions, and before the window, also in the other half of a pair."""
    for sliding_window in (0, 31):
        case = make_case(12, lengths=(150,), sliding_window=sliding_window)
        for last in (0, 6, 63, 64, 77, 128):
            row = torch.tensor([last])
            expected = case.run(row)
            poisoned = replace(case, k_cache=case.k_cache.clone(), v_cache=case.v_cache.clone())
            first = max(0, last - sliding_window + 1) if sliding_window else 0
            outside = torch.tensor([p for p in range(150) if not first <= p <= last])
            slots = case.block_tables_SB[0].long()[outside // 16] * 16 + outside % 16
            bad = torch.full((len(outside), 2, 64), float("nan"))
            bad[::2] = float("inf")
            ops.write_kv(bad, bad, poisoned.k_cache, poisoned.v_cache, slots)
            assert torch.equal(poisoned.run(row), expected), f"window {sliding_window}, position {last}"
            together = torch.tensor([last, 149, last])  # beside a row that attends those values
            assert torch.equal(poisoned.run(together)[::2], expected.expand(2, -1, -1)), f"beside another, {last}"


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


def test_rising_scores_move_the_reference() -> None:
    """Each tile of keys is larger than all before: the sums so far are rescaled time and again."""
    case = make_case(13, lengths=(400,))
    case.q_THC.fill_(1.0)
    k = torch.linspace(0, 6, 400)[:, None, None].expand(400, 2, 64).contiguous()
    positions = torch.arange(400)
    slots = case.block_tables_SB[0].long()[positions // 16] * 16 + positions % 16
    ops.write_kv(k, torch.randn(400, 2, 64), case.k_cache, case.v_cache, slots)
    assert_near_twin(case)


def test_what_a_bf16_cache_must_be() -> None:
    case = make_case(14)
    odd = torch.zeros((4, 2, 16, 3), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head size 3 of a bf16 cache must be even"):
        ops.write_kv(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), odd, odd, torch.tensor([0]))
    small = torch.zeros((4, 2, 24, 64), dtype=torch.bfloat16)
    for run in (
        lambda: ops.write_kv(torch.zeros(1, 2, 64), torch.zeros(1, 2, 64), small, small, torch.tensor([0])),
        replace(case, k_cache=small, v_cache=small).run,
    ):
        with pytest.raises(ValueError, match="block size 24 of a bf16 cache must be a multiple of 16"):
            run()


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
