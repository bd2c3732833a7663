"""Where the ranks of a generation leave values for each other: `RendezvousStore`, the server's end. Does no I/O.

The values go over the ranks' authenticated links, so that a transport over the network needs no listener to meet at.
"""

from __future__ import annotations

from collections.abc import Callable

from switchgear_runtime.errors import WireError
from switchgear_runtime.messages import StoreGet, StorePut, StoreValue

KEYS_MAX = 1 << 14
KEY_CHARS_MAX = 256
VALUE_BYTES_MAX = 64 << 10


class RendezvousStore:
    """The values of the latest generation. What concerns an earlier one is dropped: its ranks have their deadlines."""

    def __init__(self, send: Callable[[int, StoreValue], None]) -> None:
        self._send = send
        self._channel = ""
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, set[int]] = {}  # ranks, by the key that is not there yet

    def enter(self, channel: str) -> None:
        """A generation begins."""
        self._channel, self._values, self._waiting = channel, {}, {}

    def on_put(self, message: StorePut) -> None:
        """Raises WireError over a limit."""
        if message.channel != self._channel:
            return
        self._check(message.key)
        if len(message.value) > VALUE_BYTES_MAX:
            raise WireError(
                f"the value of {message.key!r} has {len(message.value)} bytes; a value has at most {VALUE_BYTES_MAX}"
            )
        self._values[message.key] = message.value
        for rank in sorted(self._waiting.pop(message.key, ())):
            self._send(rank, StoreValue(self._channel, message.key, message.value))

    def on_get(self, rank: int, message: StoreGet) -> None:
        """Answers once the values are there. Raises WireError over a limit."""
        if message.channel != self._channel:
            return
        for key in message.keys:
            self._check(key)
            if key in self._values:
                self._send(rank, StoreValue(self._channel, key, self._values[key]))
            else:
                self._waiting.setdefault(key, set()).add(rank)

    def _check(self, key: str) -> None:
        if len(key) > KEY_CHARS_MAX:
            raise WireError(f"a key has {len(key)} characters; it has at most {KEY_CHARS_MAX}")
        if key not in self._values and key not in self._waiting and len(self._values) + len(self._waiting) >= KEYS_MAX:
            raise WireError(f"a generation has at most {KEYS_MAX} keys")
