"""What the tests of the native ops share: the instruction sets this machine runs, and how to run one op under each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from switchgear_runtime import env, ops


def supported_instruction_sets() -> list[str]:
    current = ops.instruction_set()
    names = []
    for name in env.INSTRUCTION_SETS:
        try:
            ops.set_instruction_set(name)
        except ValueError:
            continue
        names.append(name)
    ops.set_instruction_set(current)
    return names


@pytest.fixture(scope="session")
def instruction_sets() -> list[str]:
    return supported_instruction_sets()


@pytest.fixture(autouse=True)
def restored_machine() -> Iterator[None]:
    """Every test leaves the threads and the instruction set as it found them."""
    current = ops.instruction_set()
    yield
    ops.set_instruction_set(current)
    ops.set_num_threads(1)


def flat_bytes(value: object) -> list[Tensor]:
    """The bits of every tensor in an op's result, so that equality is of bits (NaN and -0 included)."""
    if isinstance(value, Tensor):
        return [value.contiguous().flatten().view(torch.uint8)]
    assert isinstance(value, (tuple, list))
    return [bits for item in value for bits in flat_bytes(item)]


@pytest.fixture
def same_bits_everywhere() -> Callable[[Callable[[], object]], None]:
    """Runs an op under every instruction set and 1 to 3 threads; all must give the same bits."""

    def check(run: Callable[[], object]) -> None:
        ops.set_num_threads(1)
        expected = flat_bytes(run())
        best = ops.instruction_set()
        for name in supported_instruction_sets():
            ops.set_instruction_set(name)
            for num_threads in (1, 2, 3) if name == best else (1,):
                ops.set_num_threads(num_threads)
                got = flat_bytes(run())
                assert all(map(torch.equal, got, expected)), f"bits differ with {name}, {num_threads} threads"

    return check
