"""Faults on purpose: `FaultyTransport` wraps any transport and delays, aborts or crashes at chosen calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from switchgear_runtime.comm.transport import Transport, TransportStats
from switchgear_runtime.system import System

Result = TypeVar("Result")


class RankCrashed(BaseException):
    """The rank of this thread is dead. Not an Exception, so that no handler of a fault survives its own death."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens at the `call`-th collective of a transport (the first is 1), before it is entered or after."""

    call: int
    kind: Literal["delay", "abort", "crash"]
    moment: Literal["before", "after"] = "before"
    duration_s: float = 0.0  # of a delay


class FaultyTransport:
    """`inner` with the faults of `plan`. `crash` kills the rank (a hub's kill, say) before RankCrashed unwinds it."""

    def __init__(
        self, inner: Transport, system: System, plan: Iterable[Fault], *, crash: Callable[[], None] = lambda: None
    ) -> None:
        self._inner = inner
        self._system = system
        self._plan = tuple(plan)
        self._crash = crash
        self._num_calls = 0

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        return self._call(lambda: self._inner.all_gather(header, timeout_s=timeout_s))

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        return self._call(lambda: self._inner.all_to_all_v(send, timeout_s=timeout_s))

    def barrier(self, *, timeout_s: float) -> None:
        self._call(lambda: self._inner.barrier(timeout_s=timeout_s))

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def close(self) -> None:
        self._inner.close()

    def stats(self) -> TransportStats:
        return self._inner.stats()

    def _call(self, run: Callable[[], Result]) -> Result:
        self._num_calls += 1
        self._suffer("before")
        result = run()
        self._suffer("after")
        return result

    def _suffer(self, moment: str) -> None:
        for fault in self._plan:
            if (fault.call, fault.moment) != (self._num_calls, moment):
                continue
            if fault.kind == "delay":
                self._system.sleep(fault.duration_s)
            elif fault.kind == "abort":
                self._inner.abort(f"planned at call {fault.call}")
            else:
                self._crash()
                raise RankCrashed(f"rank {self.rank}: planned at call {fault.call}")
