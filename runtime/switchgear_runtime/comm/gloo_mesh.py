"""Connections to the other ranks through PyTorch's gloo: `GlooMesh`, the only owner of a ProcessGroupGloo.

Point-to-point only. gloo's collectives name nobody when they fail; a receive knows its peer. Three facts of gloo (torch
2.11 to 2.13, transport/tcp/pair.cc) shape this file:

- A message flows once its receive is posted, and may be shorter than that. So receives are posted one call ahead.
- A wait that times out closes every connection of the group. So waits get no short timeouts, and `sever` uses just that.
- An error reaches posted receives, but not one that is half way in. So a helper thread sits in gloo's waits, and the
  caller waits for the helper, with the caller's own deadline.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.store import KeyValueStore

_DATA_TAG, _NOBODY_SENDS_TAG = 1, 2
_WAIT_MARGIN_S = 5.0  # gloo's own timeout beyond the caller's deadline; only ends a helper that nobody waits for
_SEVER_WAIT = timedelta(milliseconds=1)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """How a wait ended. `peer` is whose connection is lost."""

    kind: Literal["done", "late", "lost", "woken"]
    peer: int = -1
    text: str = ""


class _TorchStore(Store):
    """What gloo asks of a store when it connects."""

    def __init__(self, store: KeyValueStore, timeout_s: float) -> None:
        super().__init__()
        self._store = store
        self._deadline_s = time.monotonic() + timeout_s

    def set(self, key: str, value: Any) -> None:
        self._store.put(f"gloo/{key}", value if isinstance(value, bytes) else bytes(value, "utf-8"))

    def get(self, key: str) -> bytes:
        return self._find([key])[0]

    def wait(self, keys: list[str], *_: object) -> None:
        self._find(keys)

    def _find(self, keys: list[str]) -> list[bytes]:
        names = [f"gloo/{key}" for key in keys]
        found = self._store.get(names, timeout_s=max(0.0, self._deadline_s - time.monotonic()))
        missing = [name for name in names if name not in found]
        if missing:
            raise TimeoutError(f"nobody has left {', '.join(missing)}")
        return [found[name] for name in names]


class GlooMesh:
    """Connected to all other ranks when the constructor returns. RuntimeError when gloo could not connect."""

    def __init__(self, network: Network, rank: int, world_size: int, *, timeout_s: float) -> None:
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack what we need
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=network.address)]  # binds and listens on this address only
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        self._group: Any = gloo(_TorchStore(network.store, timeout_s), rank, world_size, options)
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._waits: queue.SimpleQueue[tuple[int, list[tuple[int, Any]], timedelta] | None] = queue.SimpleQueue()
        self._num_waits = 0
        threading.Thread(
            target=_sit_in_waits, args=(self._waits, self._events), name=f"gloo-wait-{rank}", daemon=True
        ).start()

    def post(self, peer: int, buffer: memoryview) -> Any:
        """The next message of `peer` goes into `buffer`, and may be shorter. RuntimeError when it is gone."""
        return self._open().recv([_tensor(buffer)], peer, _DATA_TAG)

    def send(self, peer: int, buffer: memoryview) -> Any:
        """`buffer` must not change until the send is finished. RuntimeError when the peer is gone."""
        return self._open().send([_tensor(buffer)], peer, _DATA_TAG)

    @staticmethod
    def finish(work: Any, timeout_s: float) -> None:
        """Of a send that needs nothing more of the peer. RuntimeError when it cannot leave any more."""
        work.wait(timedelta(seconds=timeout_s))

    def wait(self, works: list[tuple[int, Any]], timeout_s: float) -> Event:
        """Until all of these posted receives and sends, each with its peer, are through."""
        deadline_s = time.monotonic() + timeout_s
        self._num_waits += 1
        self._waits.put((self._num_waits, works, timedelta(seconds=timeout_s + _WAIT_MARGIN_S)))
        while True:
            try:
                number, event = self._events.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                return Event("late")
            if event.kind == "woken" or number == self._num_waits:
                return event

    def wake(self) -> None:
        """End the pending wait, or the next. From any thread."""
        self._events.put((0, Event("woken")))

    def sever(self) -> None:
        """Close every connection, which the peers see at once. From any thread; idempotent."""
        group = self._group
        if group is None:
            return
        try:
            group.recv_anysource([torch.empty(1, dtype=torch.uint8)], _NOBODY_SENDS_TAG).wait(_SEVER_WAIT)
        except RuntimeError as error:
            log.debug("severed: %s", error)

    def close(self) -> None:
        """Sever, and let go of gloo. What is posted keeps its memory until gloo has let go of that too."""
        self.wake()
        self.sever()
        self._waits.put(None)
        self._group = None

    def _open(self) -> Any:
        group = self._group  # read once: close may come from another thread
        if group is None:
            raise RuntimeError("closed")
        return group


def _sit_in_waits(
    waits: queue.SimpleQueue[tuple[int, list[tuple[int, Any]], timedelta] | None],
    events: queue.SimpleQueue[tuple[int, Event]],
) -> None:
    while (item := waits.get()) is not None:
        number, works, timeout = item
        event = Event("done")
        for peer, work in works:
            try:
                work.wait(timeout)
            except RuntimeError as error:
                event = Event("lost", peer, str(error).splitlines()[0])
                break
        del item, works
        events.put((number, event))


def _tensor(buffer: memoryview) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8)
