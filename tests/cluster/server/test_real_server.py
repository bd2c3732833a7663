"""The real thing: `switchgear serve` on the bundled model with two local rank processes, over its sockets."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served_process import start_server, stop_server

from switchgear import LLM, AsyncClient, Client, SamplingParams

pytestmark = pytest.mark.ranks

WORDS = [
    "the",
    "a",
    "king",
    "said",
    "water",
    "of",
    "Linux",
    "def",
    "import",
    "und",
    "le",
    "perro",
    "12",
    "+",
    "=",
    "driver",
]


def requests(seed: int, num: int) -> list[tuple[str, SamplingParams]]:
    draw = random.Random(seed)
    return [
        (
            " ".join(draw.choices(WORDS, k=draw.randint(1, 40))),
            SamplingParams(
                max_tokens=draw.randint(1, 48),
                temperature=draw.choice([0.0, 0.8, 1.5]),
                top_p=draw.choice([1.0, 0.9]),
                seed=draw.randrange(1 << 53),
                ignore_eos=True,
            ),
        )
        for _ in range(num)
    ]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[LLM]:
    with LLM(ranks=1, launcher="local") as llm:
        yield llm


def reference(llm: LLM, items: list[tuple[str, SamplingParams]]) -> list[list[int]]:
    outputs = llm.generate([text for text, _ in items], [params for _, params in items], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


async def stream_tokens(client: AsyncClient, text: str, params: SamplingParams) -> list[int]:
    return [token for delta in [d async for d in client.stream(text, params)] for token in delta.token_ids]


async def sse_tokens(http: httpx.AsyncClient, text: str, params: SamplingParams) -> list[int]:
    body = {
        "prompt": text,
        "stream": True,
        "return_token_ids": True,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
        "ignore_eos": True,
    }
    tokens: list[int] = []
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    tokens += choice["token_ids"]
    return tokens


def live_sequences(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    names = ("switchgear:num_requests_running", "switchgear:num_requests_waiting")
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names))


@pytest.mark.parametrize("seed", [1, 2])
def test_concurrent_streams_equal_one_rank(server_url: str, one_rank: LLM, seed: int) -> None:
    items = requests(seed, 32)
    expected = reference(one_rank, items)

    async def run() -> list[list[int]]:
        async with (
            AsyncClient(server_url) as client,
            httpx.AsyncClient(base_url=server_url, trust_env=False, timeout=60) as http,
        ):
            gate = asyncio.Semaphore(16)

            async def one(i: int, text: str, params: SamplingParams) -> list[int]:
                async with gate:
                    return await (stream_tokens(client, text, params) if i % 2 else sse_tokens(http, text, params))

            return await asyncio.gather(*(one(i, *item) for i, item in enumerate(items)))

    got = asyncio.run(asyncio.wait_for(run(), 120))
    for (text, params), tokens, want in zip(items, got, expected, strict=True):
        assert tokens == want, f"seed {seed}: {text!r} {params}"


def test_a_batch_equals_one_rank_and_its_seeds_reproduce_it(server_url: str, one_rank: LLM) -> None:
    prompts = [text for text, _ in requests(3, 12)]
    params = SamplingParams(max_tokens=12, n=2, logprobs=3)
    with Client(server_url) as client:
        outputs = client.generate(prompts, params, use_tqdm=False)
    again = [
        (output.prompt_token_ids, SamplingParams(max_tokens=12, seed=completion.seed, logprobs=3))
        for output in outputs
        for completion in output.outputs
    ]
    alone = one_rank.generate([p for p, _ in again], [p for _, p in again], use_tqdm=False)
    completions = [completion for output in outputs for completion in output.outputs]
    for completion, other in zip(completions, alone, strict=True):
        assert completion.token_ids == other.outputs[0].token_ids
        assert completion.logprobs == other.outputs[0].logprobs
        assert completion.text == other.outputs[0].text


def test_stop_strings_and_usage(server_url: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    with httpx.Client(base_url=server_url, trust_env=False, timeout=60) as http:
        whole = http.post("/v1/completions", json=body).json()
        text = whole["choices"][0]["text"]
        stop = text[10:14]
        cut = http.post("/v1/completions", json={**body, "stop": stop}).json()
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"] == 40


def test_a_repeated_prompt_is_cached(server_url: str) -> None:
    prompt = [random.Random(8).randrange(3, 4096) for _ in range(100)]
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    with httpx.Client(base_url=server_url, trust_env=False, timeout=60) as http:
        usages = [http.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
        salted = http.post("/v1/completions", json={**body, "cache_salt": "mine"}).json()["usage"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (*usages, salted)]
    assert cached == [0, 96, 0]


def expert_rows(url: str) -> float:
    """Token rows that all experts have computed, as last reported: at the latest when the cluster parks."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("switchgear:expert_rows_total")]
    assert lines
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def settled_expert_rows(url: str) -> float:
    deadline_s = time.monotonic() + 20
    rows = -1.0
    while (now := expert_rows(url)) != rows:
        assert time.monotonic() < deadline_s, "the ranks go on computing"
        rows = now
        time.sleep(1.3)  # longer than a running rank waits between reports
    return rows


def test_a_disconnect_frees_the_sequences(server_url: str) -> None:
    """Five sequences of 1,900 tokens, left after the first: the ranks must not compute them to their ends."""
    rows_before = settled_expert_rows(server_url)

    async def run() -> None:
        async with AsyncClient(server_url) as client:
            for n in (1, 4):
                params = SamplingParams(max_tokens=1900, ignore_eos=True, n=n)
                async with aclosing(client.stream("Once upon a time", params)) as stream:
                    async for _ in stream:
                        break

    asyncio.run(asyncio.wait_for(run(), 30))
    deadline_s = time.monotonic() + 5
    while live_sequences(server_url):
        assert time.monotonic() < deadline_s, "an aborted sequence still runs"
        time.sleep(0.02)
    rows_per_token = 4 * 4  # layers, experts of a token
    assert (settled_expert_rows(server_url) - rows_before) / rows_per_token < 1900


def test_bad_input_does_not_disturb_good(server_url: str, one_rank: LLM) -> None:
    items = requests(4, 8)
    expected = reference(one_rank, items)

    async def run() -> list[list[int]]:
        async with AsyncClient(server_url) as client, httpx.AsyncClient(base_url=server_url, trust_env=False) as http:
            good = [asyncio.create_task(stream_tokens(client, *item)) for item in items]
            while not all(task.done() for task in good):
                for body in (
                    b"{",
                    b'{"prompt": [9999]}',
                    b'{"prompt": "a", "n": 1000000}',
                    b'{"prompt": "a", "temperature": -1}',
                ):
                    assert (await http.post("/v1/completions", content=body)).status_code == 400
                assert (await http.post("/v1/batch", content=b"\xc1")).status_code == 400
            return [task.result() for task in good]

    assert asyncio.run(asyncio.wait_for(run(), 60)) == expected


EXTREMES: dict[str, list[Any]] = {
    "temperature": [0, 5e-324, 1e-45, 1e-7, 100],
    "top_k": [-1, 1, 5000, 1 << 31],
    "top_p": [1e-300, 1e-45, 1],
    "min_p": [1e-300, 1],
    "repetition_penalty": [0.01, 100],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [{"0": 100}, {str(i): -100 for i in range(1024)}],
    "stop_token_ids": [[1 << 31], [0, 4095], list(range(16))],
    "seed": [-(1 << 63), (1 << 64) - 1],
    "min_tokens": [10],
    "logprobs": [0, 20],
    "stop": ["\ufffd", ["e" * 256]],
}


@pytest.mark.parametrize("seed", [1, 2])
def test_extreme_sampling_parameters_hurt_nobody(server_url: str, seed: int) -> None:
    """Each is legal, so each gets tokens; a rank that fell over them would fail the requests after it."""
    draw = random.Random(seed)
    with httpx.Client(base_url=server_url, trust_env=False, timeout=60) as http:
        for _ in range(20):
            names = draw.sample(list(EXTREMES), draw.randint(1, 6))
            fields = {name: draw.choice(EXTREMES[name]) for name in names}
            response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10, **fields})
            assert response.status_code == 200, f"seed {seed}: {fields}: {response.text}"


def test_expert_load_counts_every_token(server_url: str) -> None:
    with Client(server_url) as client:
        before = client.expert_load()
        client.generate([[5] * 30] * 4, SamplingParams(max_tokens=8), use_tqdm=False)
        deadline_s = time.monotonic() + 10
        while (after := client.expert_load()).routed == before.routed or live_sequences(server_url):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        time.sleep(0.3)  # the last report comes when the ranks park
        after = client.expert_load()
    assert len(after.rows) == 2
    for layer in range(after.num_layers):
        routed = sum(after.routed[layer]) - sum(before.routed[layer])
        assert routed > 0
        assert sum(after.routed[layer]) == sum(sum(rank[layer]) for rank in after.rows)


# --- life and death (servers of their own) ------------------------------------------------------------------------


def test_sigterm_drains_then_exits_0_and_leaves_no_process() -> None:
    process, url = start_server("--ranks", "1", "--drain-timeout-s", "20")
    children = psutil.Process(process.pid).children(recursive=True)
    body = {"prompt": "Once", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.terminate()
        deadline_s = time.monotonic() + 5
        while httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
            assert time.monotonic() < deadline_s
        refused = httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(30) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert not any(child.is_running() for child in children)


def test_a_killed_rank_changes_no_stream() -> None:
    process, url = start_server("--ranks", "2")
    try:
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "rank_worker" in " ".join(child.cmdline())
        ]
        assert len(ranks) == 2
        params = SamplingParams(max_tokens=400, ignore_eos=True, seed=7)

        async def run(victim: psutil.Process | None) -> list[list[int]]:
            async with AsyncClient(url) as client:
                started: set[int] = set()

                async def one(i: int) -> list[int]:
                    token_ids: list[int] = []
                    async for delta in client.stream([5, i], params):
                        started.add(i)
                        token_ids += delta.token_ids
                    return token_ids

                tasks = [asyncio.create_task(one(i)) for i in range(3, 9)]
                while len(started) < 6:
                    await asyncio.sleep(0.01)
                if victim is not None:
                    victim.kill()
                return await asyncio.gather(*tasks)

        whole = asyncio.run(asyncio.wait_for(run(None), 60))
        assert [len(token_ids) for token_ids in whole] == [400] * 6
        assert asyncio.run(asyncio.wait_for(run(ranks[1]), 60)) == whole
        with Client(url) as client:
            client.wait_ready(30)
            (output,) = client.generate("Once", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
            assert len(output.outputs[0].token_ids) == 5
    finally:
        assert stop_server(process) == 0


def test_a_taken_port_is_said_before_a_model_is_loaded(server_url: str) -> None:
    port = server_url.rsplit(":", 1)[1]
    with pytest.raises(AssertionError, match="ended with status 2"):
        start_server("--port", port)


def leavings() -> set[Path]:
    """What our clusters could leave in /dev/shm and the temporary folder."""
    temporary = Path(tempfile.gettempdir())
    return {*Path("/dev/shm").glob("sg-*"), *temporary.glob("sg-*"), *temporary.glob("switchgear-*")}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_soak_64_clients_for_a_minute() -> None:
    """No lost, duplicated or reordered token, no growth of memory after warm-up, nothing left behind."""
    before = leavings()
    process, url = start_server("--ranks", "2")
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    items = requests(9, 64)
    with LLM(ranks=1, launcher="local") as llm:
        expected = reference(llm, items)

    async def run() -> tuple[int, list[int]]:
        num_done = 0
        rss: list[int] = []
        end_s = time.monotonic() + 60
        async with (
            AsyncClient(url) as client,
            httpx.AsyncClient(
                base_url=url, trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None)
            ) as http,
        ):

            async def worker(i: int) -> None:
                nonlocal num_done
                draw = random.Random(i)
                while time.monotonic() < end_s:
                    k = draw.randrange(len(items))
                    tokens = await (stream_tokens(client, *items[k]) if i % 2 else sse_tokens(http, *items[k]))
                    assert tokens == expected[k], items[k]
                    num_done += 1

            async def watch() -> None:
                while time.monotonic() < end_s:
                    rss.append(sum(one.memory_info().rss for one in tree))
                    await asyncio.sleep(1)

            await asyncio.gather(watch(), *(worker(i) for i in range(64)))
        return num_done, rss

    num_done, rss = asyncio.run(asyncio.wait_for(run(), 200))
    assert num_done > 64
    warm, last = max(rss[10:25]), max(rss[-10:])
    assert last - warm < 32 << 20, f"from {warm >> 20} to {last >> 20} MiB"
    assert stop_server(process) == 0
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in tree)
    assert leavings() <= before
