"""The ranks' key-value store over the server's link: `LinkStore`. Imports no torch.

A network transport needs a place to meet. The link is there, it is authenticated, and it needs no further listener.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from switchgear_runtime.messages import StoreGet, StorePut, StoreValue
from switchgear_runtime.system import System


class LinkStore:
    """One rank's end. `take` is called by the link's reader thread; a `KeyValueStore` for one channel at a time."""

    def __init__(self, send: Callable[[StorePut | StoreGet], None], system: System) -> None:
        self._send = send
        self._system = system
        self._condition = system.condition()
        self._channel = ""
        self._values: dict[str, bytes] = {}

    def enter(self, channel: str) -> ChannelStore:
        """The values of a new generation; those of the one before are forgotten."""
        with self._condition:
            self._channel, self._values = channel, {}
        return ChannelStore(self, channel)

    def take(self, message: StoreValue) -> None:
        with self._condition:
            if message.channel == self._channel:
                self._values[message.key] = message.value
                self._condition.notify_all()

    def put(self, channel: str, key: str, value: bytes) -> None:
        self._send(StorePut(channel, key, value))

    def get(self, channel: str, keys: Sequence[str], timeout_s: float) -> dict[str, bytes]:
        deadline_s = self._system.now() + timeout_s
        with self._condition:
            missing = [key for key in keys if channel != self._channel or key not in self._values]
        if missing:
            self._send(StoreGet(channel, missing))
        with self._condition:
            self._condition.wait_for(
                lambda: channel != self._channel or all(key in self._values for key in keys),
                max(0.0, deadline_s - self._system.now()),
            )
            values = self._values if channel == self._channel else {}
            return {key: values[key] for key in keys if key in values}


class ChannelStore:
    """A `KeyValueStore`: what the ranks of one generation leave for each other."""

    def __init__(self, link_store: LinkStore, channel: str) -> None:
        self._link_store = link_store
        self._channel = channel

    def put(self, key: str, value: bytes) -> None:
        self._link_store.put(self._channel, key, value)

    def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, bytes]:
        return self._link_store.get(self._channel, keys, timeout_s)
