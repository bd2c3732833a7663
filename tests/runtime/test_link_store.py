"""The rank's end of the key-value store: waits, deadlines, generations that do not mix."""

from __future__ import annotations

import threading
import time

from switchgear_runtime.link_store import LinkStore
from switchgear_runtime.messages import StoreGet, StorePut, StoreValue, decode_from_rank, decode_to_rank, encode
from switchgear_runtime.system import RealSystem


def test_get_asks_once_waits_and_remembers() -> None:
    sent: list[StorePut | StoreGet] = []
    store = LinkStore(sent.append, RealSystem())
    values = store.enter("g")
    for delay_s, key in ((0.02, "a"), (0.04, "b")):
        threading.Timer(delay_s, store.take, [StoreValue("g", key, key.encode())]).start()
    assert values.get(["a", "b"], timeout_s=10) == {"a": b"a", "b": b"b"}
    assert values.get(["b"], timeout_s=0) == {"b": b"b"}
    values.put("c", b"\xff")
    assert sent == [StoreGet("g", ["a", "b"]), StorePut("g", "c", b"\xff")]


def test_get_returns_what_is_there_at_the_deadline() -> None:
    store = LinkStore(lambda _: None, RealSystem())
    values = store.enter("g")
    store.take(StoreValue("g", "a", b"1"))
    begin = time.monotonic()
    assert values.get(["a", "b"], timeout_s=0.05) == {"a": b"1"}
    assert 0.04 < time.monotonic() - begin < 5


def test_a_new_generation_ends_the_waits_of_the_old() -> None:
    store = LinkStore(lambda _: None, RealSystem())
    old = store.enter("old")
    store.take(StoreValue("old", "a", b"1"))
    new = store.enter("new")
    store.take(StoreValue("old", "a", b"late"))
    assert old.get(["a"], timeout_s=60) == {}
    assert new.get(["a"], timeout_s=0) == {}


def test_bytes_survive_the_wire() -> None:
    for to_rank in (StoreValue("g", "k", bytes(range(256))),):
        assert decode_to_rank(encode(to_rank)) == to_rank
    for from_rank in (StorePut("g", "k", bytes(range(256))), StoreGet("g", ["a", "b"])):
        assert decode_from_rank(encode(from_rank)) == from_rank
