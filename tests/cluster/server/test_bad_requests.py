"""Every bad request gets a 4xx in OpenAI's error shape, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from toy_server import ToyServer, toy_tokens

from switchgear.server.limits import ServerLimits

ALL_CHOICES = {"prompt": "hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def strict() -> Iterator[ToyServer]:
    server = ToyServer(
        api_key="secret", limits=ServerLimits(max_body_bytes=1 << 16, max_prompts_per_request=4, max_queued=8)
    )
    yield server
    server.close()


def check(response: httpx.Response, status: int, param: str | None, words: str, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"], error["message"]
    assert error["param"] == param
    assert code is None or error["code"] == code
    assert error["type"] == (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "nope"}, 404, "model", "does not exist"),
        ({"model": 3}, 400, "model", "model: Expected"),
        ({"prompt": None}, 400, "prompt", "prompt: Expected"),
        ({"prompt": 5}, 400, "prompt", "prompt: Expected"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt: Expected"),
        ({"prompt": []}, 400, "prompt", "empty"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": [1, "a"]}, 400, "prompt", "mixes"),
        ({"prompt": [[1, "a"]]}, 400, "prompt", "prompt[0][1]: Expected"),
        ({"prompt": [True]}, 400, "prompt", "prompt[0]: Expected"),
        ({"prompt": [4096]}, 400, "prompt", "4096"),
        ({"prompt": [-1]}, 400, "prompt", "-1"),
        ({"prompt": "a " * 5000}, 400, "prompt", "maximum context length is 2048 tokens. However, you requested"),
        ({"prompt": "x" * 1_000_000}, 400, "prompt", "maximum context length is 2048 tokens"),
        ({"prompt": ["a"] * 1025}, 400, "prompt", "1025 prompts; the limit is 1024"),
        ({"max_tokens": 2048}, 400, "prompt", "maximum context length"),
        ({"max_tokens": "5"}, 400, "max_tokens", "max_tokens: Expected int"),
        ({"max_tokens": 10**30}, 400, "max_tokens", "max_tokens"),
        ({"n": 0}, 400, "n", "n=0"),
        ({"n": 1_000_000_000}, 400, "n", "n=1000000000"),
        ({"n": 1.5}, 400, "n", "n: Expected int"),
        ({"temperature": -0.5}, 400, "temperature", "temperature=-0.5"),
        ({"temperature": "hot"}, 400, "temperature", "temperature: Expected float"),
        ({"top_p": 0}, 400, "top_p", "top_p"),
        ({"repetition_penalty": 1e-40}, 400, "repetition_penalty", "at least 0.01"),
        ({"logprobs": 21}, 400, "logprobs", "logprobs=21"),
        ({"stop": ["a"] * 17}, 400, "stop", "17"),
        ({"stop": [""]}, 400, "stop", "1 to 256"),
        ({"stop": [1]}, 400, "stop", "stop[0]: Expected str"),
        ({"logit_bias": {"9999": 1}}, 400, "logit_bias", "9999"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias"),
        ({"seed": "x"}, 400, "seed", "seed: Expected int"),
        ({"stream": "yes"}, 400, "stream", "stream: Expected bool"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens=0 asks for nothing"),
        ({"max_tokens": -1, "echo": True}, 400, "max_tokens", "max_tokens=-1"),
        ({"echo": True, "prompt": []}, 400, "prompt", "empty"),
        ({"prompt_logprobs": 21}, 400, "prompt_logprobs", "prompt_logprobs=21"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "stream=false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "json_object"),
        ({"guided_json": {"type": "object"}}, 400, "guided_json", "not supported"),
        ({"structured_outputs": {"regex": "a"}}, 400, "structured_outputs", "not supported"),
        ({"use_beam_search": True}, 400, "use_beam_search", "not supported"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"best_of": 3, "stream": True}, 400, "best_of", "stream=false"),
        ({"best_of": 2, "n": 3}, 400, "best_of", "at least n=3"),
        ({"best_of": 17}, 400, "best_of", "at most 16"),
        ({"cache_salt": "x" * 257}, 400, "cache_salt", "257"),
    ],
)
def test_bad_fields(toy: ToyServer, fields: dict[str, Any], status: int, param: str, words: str) -> None:
    response = httpx.post(f"{toy.url}/v1/completions", json={**ALL_CHOICES, **fields}, trust_env=False)
    check(response, status, param, words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "a"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
    ],
)
def test_malformed_json(toy: ToyServer, body: bytes) -> None:
    response = httpx.post(f"{toy.url}/v1/completions", content=body, trust_env=False)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (b"\x81\xa7prompts", "not valid msgpack"),
        (b"\xdf\xff\xff\xff\xff", "not valid msgpack"),
        (b"\x81\xa7prompts\xdd\xff\xff\xff\xff", "prompts"),
        (b"\x81\xa7prompts\xc7\x01\x05x", "prompts"),
        (b"\x91" * 100_000, "Expected object"),
        (msgspec.msgpack.encode({"prompts": ["a"], "sampling": {"tempature": 1}}), "tempature"),
        (msgspec.msgpack.encode({"prompts": ["a"], "sampling": [{}, {}]}), "2 sampling parameters came for 1"),
        (msgspec.msgpack.encode({"prompts": ["a"], "sampling": {"temperature": -1}}), "temperature=-1"),
        (msgspec.msgpack.encode({"prompts": ["a"], "sampling": {"n": 10**9}}), "n=1000000000"),
        (msgspec.msgpack.encode({"prompts": [3]}), "prompts[0]"),
        (msgspec.msgpack.encode({"prompts": []}), "empty"),
        (b"\x81\xa7prompts\x91\xa2\xff\xfe", "UTF-8"),
        (msgspec.msgpack.encode({"prompts": ["a"]}) + b"x", "trailing"),
    ],
)
def test_malformed_msgpack(toy: ToyServer, body: bytes, words: str) -> None:
    response = httpx.post(f"{toy.url}/v1/batch", content=body, trust_env=False)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words.lower() in error["message"].lower(), error["message"]


def test_unknown_routes_and_methods(toy: ToyServer) -> None:
    check(httpx.get(f"{toy.url}/nothing", trust_env=False), 404, None, "/nothing")
    response = httpx.get(f"{toy.url}/v1/completions", trust_env=False)
    check(response, 405, None, "does not take GET")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/ready", "/metrics", "/v1/models", "/v1/expert_load", "/nothing"])
@pytest.mark.parametrize("key", [None, "wrong", "secre", "secret2"])
def test_the_key_covers_every_route_but_health(strict: ToyServer, path: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    check(httpx.get(strict.url + path, headers=headers, trust_env=False), 401, None, "API key", "invalid_api_key")
    assert httpx.get(f"{strict.url}/health", headers=headers, trust_env=False).status_code == 200
    assert (
        httpx.get(f"{strict.url}/ready", headers={"Authorization": "Bearer secret"}, trust_env=False).status_code == 200
    )


def test_a_full_queue_is_429_with_a_hint(strict: ToyServer) -> None:
    headers = {"Authorization": "Bearer secret"}
    strict.step_s = 0.05
    with (
        httpx.Client(base_url=strict.url, headers=headers, trust_env=False) as http,
        http.stream("POST", "/v1/completions", json={"prompt": ["a"] * 4, "n": 2, "max_tokens": 1000, "stream": True}),
    ):
        response = http.post("/v1/completions", json=ALL_CHOICES)
        check(response, 429, None, "queue is full", "queue_full")
        assert int(response.headers["retry-after"]) > 0
    strict.step_s = 0.001
    wait_until(lambda: strict.num_held == 0)


def test_not_ready_is_503_with_a_hint(strict: ToyServer) -> None:
    headers = {"Authorization": "Bearer secret"}
    strict.core.set_ready(None)
    try:
        for response in (
            httpx.get(f"{strict.url}/ready", headers=headers, trust_env=False),
            httpx.post(f"{strict.url}/v1/completions", json=ALL_CHOICES, headers=headers, trust_env=False),
        ):
            check(response, 503, None, "not ready")
            assert int(response.headers["retry-after"]) > 0
    finally:
        strict.core.set_ready([0, 1])


# --- bodies without end -------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.002)


def talk(server: ToyServer, head: str, body: Iterator[bytes]) -> bytes:
    """Raw HTTP: send all of `body` as long as the server takes it, then read the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        try:
            for piece in body:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        while b"}}" not in answer and (piece := connection.recv(65536)):
            answer += piece
        return answer


def head(length: str) -> str:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n{length}\r\n\r\n"


def test_a_body_announced_as_1_gb_is_refused_before_it_is_read(strict: ToyServer) -> None:
    answer = talk(strict, head("Content-Length: 1000000000"), iter(()))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer


def test_a_1_gb_body_is_never_held(strict: ToyServer) -> None:
    """Chunked, so nothing announces its size; the sender sees the answer, and the server does not grow."""
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    before = max_rss_bytes()
    answer = talk(strict, head("Transfer-Encoding: chunked"), (piece for _ in range(1 << 14)))
    assert answer.startswith(b"HTTP/1.1 413")
    assert max_rss_bytes() - before < 64 << 20


def max_rss_bytes() -> int:
    """High-water mark of this process, which is also the server's."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- nobody else notices ------------------------------------------------------------------------------------------


def test_bad_requests_do_not_disturb_a_good_one(toy: ToyServer) -> None:
    stop = threading.Event()
    statuses: list[int] = []

    def misbehave() -> None:
        with httpx.Client(base_url=toy.url, trust_env=False) as http:
            while not stop.is_set():
                statuses.append(http.post("/v1/completions", content=b"\xff{").status_code)
                statuses.append(http.post("/v1/batch", content=b"\xc1").status_code)
                statuses.append(http.post("/v1/completions", json={"prompt": [9999]}).status_code)

    noise = threading.Thread(target=misbehave)
    noise.start()
    try:
        for seed in range(5):
            body = {"prompt": [5, 6], "max_tokens": 100, "seed": seed, "return_token_ids": True}
            good = httpx.post(f"{toy.url}/v1/completions", json=body, trust_env=False).json()
            assert good["choices"][0]["token_ids"] == toy_tokens([5, 6], seed, 100)
    finally:
        stop.set()
        noise.join(10)
    assert set(statuses) == {400}


# --- clients that go away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["stream", "whole", "batch"])
def test_a_client_that_goes_away_frees_its_sequences_within_a_step(route: str) -> None:
    server = ToyServer(step_s=0.2)
    try:
        path = "/v1/batch" if route == "batch" else "/v1/completions"
        if route == "batch":
            body = msgspec.msgpack.encode({"prompts": ["a", "b"], "sampling": {"max_tokens": 2000}})
        else:
            body = json.dumps({"prompt": ["a", "b"], "max_tokens": 2000, "stream": route == "stream"}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.num_held == 2)
        if route != "whole":
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        steps = server.num_steps
        connection.close()
        wait_until(lambda: server.num_held == 0)
        assert server.num_steps - steps <= 1
        assert server.core.num_live == 0
    finally:
        server.close()


def test_a_slow_reader_costs_no_memory_beyond_its_own_tokens(toy: ToyServer) -> None:
    """It reads nothing for a while: deltas coalesce, others go on, and then it gets every token in order."""
    host, port = toy.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"prompt": [5], "n": 8, "max_tokens": 2000, "seed": 1, "stream": True, "return_token_ids": True}
    ).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect((host, int(port)))
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: toy.num_held == 8)
        fast = httpx.post(
            f"{toy.url}/v1/completions",
            json={"prompt": [6], "max_tokens": 50, "seed": 2, "return_token_ids": True},
            trust_env=False,
        )
        assert fast.json()["choices"][0]["token_ids"] == toy_tokens([6], 2, 50)
        wait_until(lambda: toy.num_held == 0, 20)
        answer = b""
        while b"data: [DONE]" not in answer:
            answer += slow.recv(1 << 16)
    events = [
        json.loads(line[6:]) for line in answer.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")
    ]
    choices = [choice for event in events for choice in event["choices"]]
    seeds = {choice["index"]: choice["seed"] for choice in choices if "seed" in choice}
    for index in range(8):
        got = [i for choice in choices if choice["index"] == index for i in choice["token_ids"]]
        assert got == toy_tokens([5], seeds[index], 2000)
    assert len(choices) < 8 * 2000  # they were coalesced
