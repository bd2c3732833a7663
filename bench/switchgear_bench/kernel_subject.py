"""What `bench kernels` times: one op of the C ABI with operands prepared, what it must do at least, and how its result is checked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_bench.transport_native import library
from switchgear_runtime import native

ARENA_BYTES = 512 << 20  # of operands that should come from memory: a call meets its own again after so many others


class WrongResult(RuntimeError):
    """A kernel computed something else than its reference; its time means nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Baseline:
    name: str
    run: Callable[[int], object]  # call i, with operands from another place each time, as ours


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """`calls`: argument words, a row for each place operands come from (kernel_loop.h). `check` looks at one call's output."""

    kernel: str
    op: str
    format: str
    shape: str
    num_tokens: int
    calls: NDArray[np.uint64]
    num_bytes: float  # every operand and result once
    flops: float
    arithmetic: Literal["float32", "bfloat16"]
    source: Literal["memory", "cache"]  # where operands are when a call begins
    prepare: Callable[[], object]  # spoils the output, so that a check sees this call's
    check: Callable[[], None]
    baseline: Baseline | None = None
    keep: Sequence[object] = field(default_factory=tuple)  # what the addresses in `calls` belong to

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.format} {self.shape}, {self.num_tokens} tokens"

    def repeat(self, first: int, num_calls: int) -> float:
        """Seconds of `num_calls` calls, the first of them with row `first` of `calls`."""
        entry = ctypes.cast(getattr(native.core(), f"sg_{self.op}"), ctypes.c_void_p)
        ns = ctypes.c_uint64()
        num_rows, width = self.calls.shape
        status = library().sg_bench_repeat(
            self.op.encode(), entry, self.calls.ctypes.data, width, num_rows, first, num_calls, ctypes.byref(ns)
        )
        if status:
            raise RuntimeError(f"{self.name}: {native.last_error() or f'status {status}'}")
        return float(ns.value) / 1e9

    def check_once(self) -> None:
        """Raises WrongResult unless a call on spoilt output gives what the reference does."""
        self.prepare()
        self.repeat(0, 1)
        try:
            self.check()
        except AssertionError as error:
            raise WrongResult(f"{self.name}: {error}") from error


Word = int | float | Tensor | ctypes.Structure | None


def words(*arguments: Word) -> list[int]:
    """An op's arguments as machine words; tensors and structures by address."""
    return [_word(argument) for argument in arguments]


def _word(argument: Word) -> int:
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, ctypes.Structure):
        return ctypes.addressof(argument)
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.uint32))
    return argument & (1 << 64) - 1


def call_rows(rows: Sequence[list[int]]) -> NDArray[np.uint64]:
    return np.array(rows, dtype=np.uint64)


def num_copies(num_bytes: int, arena_bytes: int) -> int:
    """How often an operand of `num_bytes` must be there, so that all together fill the arena."""
    return max(1, -(-arena_bytes // num_bytes))


def spoil(*outputs: Tensor) -> None:
    for output in outputs:
        output.fill_(float("nan") if output.is_floating_point() else 255 if output.dtype == torch.uint8 else -1)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To `tolerance` of the largest expected value. NaN is near nothing."""
    error = (found.double() - expected.double()).abs().max().item()
    allowed = tolerance * expected.double().abs().max().item()
    assert error <= allowed, f"off by {error:.3g} where {allowed:.3g} is allowed"
