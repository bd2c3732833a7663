"""The server's end of the ranks' key-value store: who gets what and when, and its limits."""

from __future__ import annotations

import pytest

from switchgear.rendezvous_store import KEY_CHARS_MAX, KEYS_MAX, VALUE_BYTES_MAX, RendezvousStore
from switchgear_runtime.errors import WireError
from switchgear_runtime.messages import StoreGet, StorePut, StoreValue


@pytest.fixture
def sent() -> list[tuple[int, StoreValue]]:
    return []


@pytest.fixture
def store(sent: list[tuple[int, StoreValue]]) -> RendezvousStore:
    store = RendezvousStore(lambda rank, value: sent.append((rank, value)))
    store.enter("one")
    return store


def test_values_reach_those_who_ask_before_and_after(
    store: RendezvousStore, sent: list[tuple[int, StoreValue]]
) -> None:
    store.on_get(2, StoreGet("one", ["here/0", "here/1"]))
    store.on_get(1, StoreGet("one", ["here/0"]))
    assert sent == []
    value = StoreValue("one", "here/0", b"\x00\xff")
    store.on_put(StorePut("one", "here/0", b"\x00\xff"))
    assert sent == [(1, value), (2, value)]
    store.on_get(0, StoreGet("one", ["here/0"]))
    assert sent[2:] == [(0, value)]


def test_generations_do_not_mix(store: RendezvousStore, sent: list[tuple[int, StoreValue]]) -> None:
    store.on_put(StorePut("one", "key", b"old"))
    store.enter("two")
    store.on_get(0, StoreGet("two", ["key"]))
    store.on_put(StorePut("one", "key", b"late"))
    store.on_get(1, StoreGet("one", ["key"]))
    assert sent == []


def test_limits(store: RendezvousStore) -> None:
    for message in (StorePut("one", "k" * (KEY_CHARS_MAX + 1), b""), StorePut("one", "k", bytes(VALUE_BYTES_MAX + 1))):
        with pytest.raises(WireError):
            store.on_put(message)
    store.on_get(0, StoreGet("one", [f"{number}" for number in range(KEYS_MAX)]))
    store.on_put(StorePut("one", "0", b""))  # it has been asked for, so it is no further key
    with pytest.raises(WireError, match="at most"):
        store.on_put(StorePut("one", "one more", b""))
