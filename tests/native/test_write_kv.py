"""write_kv: against the twin, and each layout against the index that its documentation gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from switchgear_runtime import ops, ops_reference

SHAPES = [(torch.float32, 16, 64), (torch.float32, 5, 18), (torch.bfloat16, 16, 64), (torch.bfloat16, 48, 18)]


@pytest.mark.parametrize(("dtype", "block_size", "head_size"), SHAPES)
def test_equals_twin(
    dtype: torch.dtype, block_size: int, head_size: int, same_bits_everywhere: Callable[..., None]
) -> None:
    torch.manual_seed(block_size)
    num_slots = 4 * block_size
    for slots in (
        torch.randperm(num_slots)[:9],
        torch.arange(3, num_slots - 1),  # a prefill: odd and even halves side by side
        torch.tensor([4, 5, 4, 5, 5, 4]),  # the later wins
    ):
        k, v = torch.randn(len(slots), 2, head_size), torch.randn(len(slots), 2, head_size)
        old = torch.randn(4, 2, block_size, head_size).to(dtype)

        def write(k: Tensor = k, v: Tensor = v, slots: Tensor = slots, old: Tensor = old) -> list[Tensor]:
            caches = [old.clone(), old.clone()]
            ops.write_kv(k, v, caches[0], caches[1], slots)
            return caches

        expected = [old.clone(), old.clone()]
        ops_reference.write_kv(k, v, expected[0], expected[1], slots)
        assert all(map(torch.equal, write(), expected))
        same_bits_everywhere(lambda: [cache.float() for cache in write()])


def test_threads_change_no_bit(same_bits_everywhere: Callable[..., None]) -> None:
    """Enough tokens that the pool takes part; some slots named twice."""
    torch.manual_seed(0)
    k, v = torch.randn(700, 4, 64), torch.randn(700, 4, 64)
    slots = torch.randint(0, 40 * 16, (700,))

    def write() -> list[Tensor]:
        caches = [torch.zeros((40, 4, 16, 64), dtype=torch.bfloat16) for _ in range(2)]
        ops.write_kv(k, v, caches[0], caches[1], slots)
        return [cache.float() for cache in caches]

    same_bits_everywhere(write)


def test_layout_is_the_documented_one() -> None:
    torch.manual_seed(1)
    block_size, c = 32, 6
    k, v = torch.randn(block_size, 1, c), torch.randn(block_size, 1, c)
    caches = [torch.zeros((1, 1, block_size, c), dtype=torch.bfloat16) for _ in range(2)]
    ops.write_kv(k, v, caches[0], caches[1], torch.arange(block_size))
    flat_k, flat_v = caches[0].flatten(), caches[1].flatten()
    for p in range(block_size):
        for i in range(c):
            at_k = p // 16 * 16 * c + i // 2 * 32 + p % 16 * 2 + i % 2
            assert flat_k[at_k] == k[p, 0, i].to(torch.bfloat16)
            assert flat_v[p // 2 * 2 * c + 2 * i + p % 2] == v[p, 0, i].to(torch.bfloat16)
    assert torch.equal(ops_reference.unpack_k(caches[0])[0, 0], k[:, 0].to(torch.bfloat16))
    assert torch.equal(ops_reference.unpack_v(caches[1])[0, 0], v[:, 0].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_slot_writes_nothing(dtype: torch.dtype) -> None:
    k = torch.randn(9, 2, 64)
    caches = [torch.zeros((4, 2, 16, 64), dtype=dtype) for _ in range(2)]
    for bad in (-1, 64):
        slots = torch.arange(9)
        slots[4] = bad
        with pytest.raises(ValueError, match=rf"slots_T\[4\]={bad}"):
            ops.write_kv(k, k, caches[0], caches[1], slots)
    assert not caches[0].any()
    assert not caches[1].any()
