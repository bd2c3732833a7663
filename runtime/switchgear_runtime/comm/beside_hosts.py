"""A device's transport beside the hosts': `BesideHosts`, what NCCL's and peer memory's have in common.

Headers, lengths and small messages go over the hosts' transport (`control`), which also names who is missing; only
rows in device memory go another way. After an error of either, both are over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from switchgear_runtime.comm.device_exchange import Parts
from switchgear_runtime.comm.transport import Transport, TransportStats
from switchgear_runtime.errors import TransportError


class BesideHosts:
    """A Transport, by `control`; subclasses add `exchange`."""

    def __init__(self, control: Transport) -> None:
        self._control = control
        self._num_exchanges = self._sent_bytes = self._received_bytes = 0

    @property
    def control(self) -> Transport:
        """The hosts'."""
        return self._control

    @property
    def rank(self) -> int:
        return self._control.rank

    @property
    def world_size(self) -> int:
        return self._control.world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        with self._giving_up():
            return self._control.all_gather(header, timeout_s=timeout_s)

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        with self._giving_up():
            return self._control.all_to_all_v(send, timeout_s=timeout_s)

    def barrier(self, *, timeout_s: float) -> None:
        with self._giving_up():
            self._control.barrier(timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        """What belongs to the device is given up by the thread that uses it, when its next call shows the abort."""
        self._control.abort(reason)

    def close(self) -> None:
        self._control.close()
        self._give_up()

    def stats(self) -> TransportStats:
        host = self._control.stats()
        return TransportStats(
            num_calls=host.num_calls + self._num_exchanges,
            sent_bytes=host.sent_bytes + self._sent_bytes,
            received_bytes=host.received_bytes + self._received_bytes,
        )

    def _count(self, send: Sequence[Parts], received: Sequence[Parts]) -> None:
        self._num_exchanges += 1
        for given, got in zip(send, received, strict=True):
            begin, end = part_of(given, self.rank)
            self._sent_bytes += given.offsets[-1] - given.offsets[0] - (end - begin)
            self._received_bytes += got.offsets[-1] - (end - begin)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except TransportError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Free what belongs to the device. Local, waits for no peer, idempotent."""
        raise NotImplementedError


def part_of(parts: Parts, rank: int) -> tuple[int, int]:
    return parts.offsets[rank], parts.offsets[rank + 1]
