"""Hostile and overloading clients: what they may hold is bounded, and refusing them costs others next to nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import msgpack
import pytest
from ranks_by_hand import deal
from toy_server import ToyServer

from switchgear.server import admission as admission_module
from switchgear.server import connections, delta_stream, schema
from switchgear.server.body import SMALL_BODY_BYTES
from switchgear.server.containers import (
    CONTAINERS_MAX,
    num_json_containers,
    num_msgpack_containers,
)
from switchgear.server.delta_stream import DeltaStream
from switchgear.server.events import SequenceEvent, TokenLogprob
from switchgear.server.limits import ServerLimits
from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import SamplingParams


@pytest.fixture
def small() -> Iterator[ToyServer]:
    limits = ServerLimits(max_body_bytes=1 << 20, max_total_body_bytes=4 << 20, max_unread_logprobs=5000)
    server = ToyServer(limits=limits, max_connections=40)
    yield server
    server.close()


def dial(server: ToyServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.005)


def post(server: ToyServer, path: str, body: bytes) -> httpx.Response:
    return httpx.post(server.url + path, content=body, trust_env=False, timeout=30)


def answer(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


# --- what clients may hold ------------------------------------------------------------------------------------------


def test_stalled_bodies_are_bounded_together_and_keep_no_small_request_out(small: ToyServer) -> None:
    size = 1 << 20
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    with ExitStack() as stack:
        stalled = [stack.enter_context(dial(small)) for _ in range(12)]
        answers: list[bytes] = []
        for connection in stalled:
            connection.sendall(head + b"a" * (size - 1))
        busy = [connection for connection in stalled if refused(connection, answers)]
        # Each holds what is beyond its free bytes: four fit, for a fifth there is room only in part.
        assert len(stalled) - len(busy) == 4
        assert answers[0].startswith(b"HTTP/1.1 503")
        assert error_in(answers[0])["code"] == "unavailable"
        assert b"retry-after: 2" in answers[0].lower()
        assert post(small, "/v1/completions", b'{"prompt": [5], "max_tokens": 1}').status_code == 200
        large = json.dumps({"prompt": "a", "user": "b" * (6 * SMALL_BODY_BYTES)}).encode()
        assert post(small, "/v1/completions", large).status_code == 503
    until(lambda: post(small, "/v1/completions", large).status_code == 200)


def refused(connection: socket.socket, answers: list[bytes]) -> bool:
    connection.settimeout(0.25)
    got = b""
    try:
        while b"}}" not in got:
            got += connection.recv(1 << 16)
    except TimeoutError:
        return False
    answers.append(got)
    return True


def error_in(answer: bytes) -> dict[str, Any]:
    """OpenAI's object in a raw response, chunked or not."""
    error: dict[str, Any] = json.loads(answer[answer.index(b'{"error"') : answer.rindex(b"}}") + 2])["error"]
    return error


def test_connections_are_bounded_and_health_is_still_heard(small: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_BYTE_S", 60.0)
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(dial(small))
        with dial(small) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            got = answer(connection)
            assert got.startswith(b"HTTP/1.1 503")
            assert error_in(got)["code"] == "unavailable"
            assert "over 40 clients" in error_in(got)["message"]
        assert httpx.get(f"{small.url}/health", trust_env=False).status_code == 200
        for _ in range(41):  # those beyond twice the bound are not heard
            stack.enter_context(dial(small))
        with dial(small) as connection, pytest.raises((ConnectionError, AssertionError)):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100)
    until(lambda: httpx.get(f"{small.url}/v1/models", trust_env=False).status_code == 200)


def test_a_connection_that_says_nothing_is_closed(small: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_BYTE_S", 0.1)
    with dial(small) as silent:
        assert silent.recv(1) == b""


def test_a_reader_that_stops_loses_its_logprobs(small: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold 16 x 2000 tokens with 20 alternatives each. Its request ends, and what waited is dropped."""
    monkeypatch.setattr(delta_stream, "SLOW_READ_S", 0.1)
    small.step_s = 0.005
    body = {"prompt": [5], "n": 16, "max_tokens": 2000, "logprobs": 20, "stream": True}
    data = json.dumps(body).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        host, port = small.url.removeprefix("http://").split(":")
        slow.connect((host, int(port)))
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: small.num_held == 16)
        until(lambda: small.num_held == 0)
        assert small.num_steps < 1900, "it was cut off, not served to the end"
        until(lambda: small.core.num_live == 0)
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += slow.recv(1 << 16)
    assert b"the client reads too slowly" in got
    assert b"[DONE]" in got


def test_only_who_takes_nothing_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_stream, "SLOW_READ_S", 0.05)
    scored = TokenLogprob(token_id=1, logprob=-1.0, top=[(1, -1.0)] * 9)
    event = SequenceEvent(prompt_index=0, index=0, token_ids=[1] * 10, text="", logprobs=[scored] * 10)

    async def run() -> None:
        ended: list[int] = []
        stream = DeltaStream(1, max_logprobs=150)
        stream.on_overflow = lambda: ended.append(1)
        for _ in range(4):  # bursts over the limit, each read in time
            stream.put(event)
            stream.put(event)
            await asyncio.sleep(0.03)
            assert len((await stream.read(1))[0].token_ids) == 20
        await asyncio.sleep(0.1)
        assert not ended
        stream.put(event)
        await asyncio.sleep(0.1)
        assert not ended, "below the limit one may be as slow as one likes"
        stream.put(event)
        await asyncio.sleep(0.1)
        assert ended == [1]
        stream.put(event)
        assert not stream.done
        with pytest.raises(RequestError, match="reads too slowly"):
            await stream.read(1)

    asyncio.run(run())


# --- what a refusal may cost ----------------------------------------------------------------------------------------


class Watch:
    """The longest that the server's loop was held up."""

    def __init__(self, server: ToyServer) -> None:
        self.worst_s = 0.0
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.is_set():
            start_s = time.monotonic()
            self._server.on_loop(lambda: None)
            self.worst_s = max(self.worst_s, time.monotonic() - start_s)
            time.sleep(0.002)


def conversations(num_items: int) -> bytes:
    head = b"\x81" + msgpack.packb("conversations") + b"\x81" + msgpack.packb("messages") + b"\x91"
    return bytes(head) + b"\xdd" + num_items.to_bytes(4, "big") + b"\x80" * num_items


MILLIONS = {
    "arrays": ("/v1/completions", b'{"prompt":[' + b"[]," * 2_700_000 + b"[]]}"),
    "arrays between strings": ("/v1/completions", b'{"prompt":[' + b'"[",[],' * 1_100_000 + b'""]}'),
    "ids": ("/v1/completions", b'{"prompt":[' + b"1," * 4_100_000 + b"1]}"),
    "objects": ("/v1/chat/completions", b'{"messages":[' + b"{}," * 2_700_000 + b"{}]}"),
    "unknown": ("/v1/completions", b'{"prompt":"a","guided_json":' + b"[" * 4_000_000 + b"}"),
    "sampling": ("/v1/batch", msgpack.packb({"prompts": ["a"], "sampling": [{}] * 65536})),
    "messages": ("/v1/batch", conversations(8_000_000)),
}


@pytest.mark.parametrize("name", MILLIONS)
def test_millions_of_small_things_hold_nobody_up(toy: ToyServer, name: str) -> None:
    path, body = MILLIONS[name]
    worst_s: list[float] = []
    for _ in range(3):  # this machine may be busy
        with Watch(toy) as watch:
            response = post(toy, path, body)
        assert response.status_code == 400, response.text
        worst_s.append(watch.worst_s)
        if min(worst_s) < 0.3:
            return
    pytest.fail(f"{name}: the loop was held up for {worst_s} s; {response.text}")


def test_a_large_request_is_admitted_in_turns() -> None:
    """256 prompts of 16 choices with 1024 biases each: little at once, and little is sent."""
    params = SamplingParams(n=16, max_tokens=1, logit_bias=dict.fromkeys(range(1024), 1))
    took_s: list[float] = []
    for _ in range(3):
        hand = deal()
        admissions = hand.core.check([[7] * 1000] * 256, params)
        start_s = time.process_time()
        hand.core.admit(admissions, sink=hand.events.append)
        took_s.append(time.process_time() - start_s)
        assert hand.core.num_live == 4096
        assert len(hand.sent) <= 2 * 128
    assert min(took_s) < 0.15


def test_counts_are_compared_before_anything_is_made(toy: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(schema.NativeSampling, "to_params", made)
    for num_prompts, num_params, words in ((1, 65536, "65536 sampling parameters came for 1"), (1025, 1025, "1025")):
        response = post(
            toy, "/v1/batch", msgpack.packb({"prompts": ["a"] * num_prompts, "sampling": [{}] * num_params})
        )
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]


def test_lengths_are_compared_before_ids_and_salts_before_texts(
    monkeypatch: pytest.MonkeyPatch, toy: ToyServer
) -> None:
    num_looks: list[int] = []
    monkeypatch.setattr(admission_module, "_is_token_id", lambda item: num_looks.append(1) or isinstance(item, int))
    hand = deal()
    for prompts in ([1] * 3000, [[1] * 3000], [1, *["a"] * 3000]):
        with pytest.raises(RequestError, match="maximum context length"):
            hand.core.check(prompts, SamplingParams())
    assert len(num_looks) == 3
    with pytest.raises(RequestError, match="2000 prompts; the limit is 1024"):
        hand.core.check([[], *[None] * 1999], SamplingParams())
    monkeypatch.setattr(type(toy.tokenizer), "encode", lambda *_: pytest.fail("tokenized"))
    for path, fields in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": []})):
        response = post(toy, f"/v1/{path}", json.dumps({**fields, "cache_salt": "x" * 300}).encode())
        assert response.json()["error"]["param"] == "cache_salt"


# --- counting containers --------------------------------------------------------------------------------------------


def draw_value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(9 if depth else 7)
    scalars: list[Any] = [None, True, draw.getrandbits(draw.randrange(1, 60)), -draw.getrandbits(40), draw.random()]
    if kind < 5:
        return scalars[kind]
    if kind < 7:
        return "".join(
            draw.choices('[]{}"\\ab\n\u00e9\u4e2d', k=draw.choice([0, 3, 40, 300, 70000 if depth == 3 else 5]))
        )
    items = [draw_value(draw, depth - 1) for _ in range(draw.choice([0, 2, 20]))]
    return items if kind == 7 else {str(i): item for i, item in enumerate(items)}


def count(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(count, value.values()))
    return 1 + sum(map(count, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize("seed", range(30))
def test_containers_are_counted_exactly(seed: int) -> None:
    draw = random.Random(seed)
    value = [draw_value(draw, 3) for _ in range(10)]
    assert num_json_containers(json.dumps(value, ensure_ascii=seed % 2 == 0).encode()) == count(value), f"seed {seed}"
    assert num_msgpack_containers(msgpack.packb(value, use_single_float=seed % 2 == 0)) == count(value), f"seed {seed}"


@pytest.mark.parametrize("seed", range(10))
def test_counting_noise_ends(seed: int) -> None:
    draw = random.Random(seed)
    num_json_containers(bytes(draw.choices(b'[{"\\x', k=10000)))
    num_msgpack_containers(draw.randbytes(10000))


def test_counting_takes_linear_time_and_stops_early() -> None:
    start_s = time.monotonic()
    for body in (b'"' + b'\\"' * 2_000_000, b'"' * 2_000_001, b"\\" * 4_000_000, b'"' + b"a" * 4_000_000 + b"\\"):
        assert num_json_containers(body) == 0
    assert CONTAINERS_MAX < num_json_containers(b"[" * 8_000_000) <= 2 * CONTAINERS_MAX
    assert num_msgpack_containers(b"\x90" * 8_000_000) == CONTAINERS_MAX + 1
    assert time.monotonic() - start_s < 5


def test_texts_with_brackets_are_no_containers(toy: ToyServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "[{" * 50_000}]}).encode()
    response = post(toy, "/v1/chat/completions", body)
    assert "maximum context length" in response.json()["error"]["message"]
