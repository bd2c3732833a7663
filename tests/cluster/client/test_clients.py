"""Client and AsyncClient against the real frontend over toy ranks."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing

import httpx
import pytest
from toy_server import ToyServer, toy_tokens

from switchgear import AsyncClient, Client, RequestOutput, SamplingParams, http_calls
from switchgear.client_errors import AuthenticationFailed, ServerBusy, ServerError, ServerUnreachable
from switchgear.server.limits import ServerLimits
from switchgear_runtime.errors import ConfigError, RankFailed, RequestError


@pytest.fixture
def client(toy: ToyServer) -> Iterator[Client]:
    with Client(toy.url) as client:
        yield client


def check_toy(toy: ToyServer, output: RequestOutput, prompt_token_ids: list[int]) -> None:
    """Every token is the toy's, and the text is theirs."""
    assert output.finished
    assert output.prompt_token_ids == prompt_token_ids
    for completion in output.outputs:
        assert completion.seed is not None
        expected = toy_tokens(prompt_token_ids, completion.seed, len(completion.token_ids))
        assert completion.token_ids == expected
        assert completion.text == toy.tokenizer.decode(expected)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_batch(toy: ToyServer, client: Client, seed: int) -> None:
    draw = random.Random(seed)
    prompts: list[str | list[int]] = [
        draw.choice(["one", "two words", "\u00e9\u00e8 \U0001f600"])
        if draw.random() < 0.5
        else draw.choices(range(3, 4096), k=9)
        for _ in range(draw.randint(1, 40))
    ]
    params = [
        SamplingParams(
            max_tokens=draw.randint(1, 60), n=draw.randint(1, 3), seed=draw.choice([None, 5, -5, (1 << 64) - 1])
        )
        for _ in prompts
    ]
    outputs = client.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt == (prompt if isinstance(prompt, str) else None)
        check_toy(toy, output, toy.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        assert [(c.index, len(c.token_ids)) for c in output.outputs] == [(i, one.max_tokens) for i in range(one.n)], (
            seed
        )
        if one.seed is not None:
            assert output.outputs[0].seed == one.seed % (1 << 64)
        assert output.metrics.first_token_s is not None
        assert output.metrics.finished_s is not None
        assert 0 < output.metrics.first_token_s <= output.metrics.finished_s


def test_forms_of_a_prompt(toy: ToyServer, client: Client) -> None:
    one = SamplingParams(max_tokens=2)
    for prompts in (
        "hello",
        ["hello"],
        {"prompt": "hello"},
        toy.tokenizer.encode("hello"),
        {"prompt_token_ids": toy.tokenizer.encode("hello")},
    ):
        (output,) = client.generate(prompts, one, use_tqdm=False)
        check_toy(toy, output, toy.tokenizer.encode("hello"))
    assert client.generate([], one, use_tqdm=False) == []
    (output,) = client.generate("hello", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    (output,) = client.generate([[5] * 2040], SamplingParams(max_tokens=None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8


def test_more_prompts_than_one_call_takes(toy: ToyServer, client: Client) -> None:
    outputs = client.generate([[5 + i] for i in range(1030)], SamplingParams(max_tokens=2), use_tqdm=False)
    for i, output in enumerate(outputs):
        check_toy(toy, output, [5 + i])
    assert len({output.request_id for output in outputs}) == 1030


def test_logprobs(client: Client) -> None:
    (output,) = client.generate([[5]], SamplingParams(max_tokens=3, logprobs=2), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.cumulative_logprob == -1.5
    assert completion.logprobs is not None
    for token_id, by_id in zip(completion.token_ids, completion.logprobs, strict=True):
        assert by_id[token_id].logprob == -0.5
        assert [one.rank for one in by_id.values()] == [1, 2]


def test_stream(toy: ToyServer, client: Client) -> None:
    prompt = toy.tokenizer.encode("hello")
    deltas = list(client.stream("hello", SamplingParams(max_tokens=50, seed=4)))
    assert [i for delta in deltas for i in delta.token_ids] == toy_tokens(prompt, 4, 50)
    assert "".join(delta.text for delta in deltas) == toy.tokenizer.decode(toy_tokens(prompt, 4, 50))
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert deltas[-1].seed == 4


def test_closing_a_stream_ends_the_request() -> None:
    server = ToyServer(step_s=0.02)
    try:
        with Client(server.url) as slow:
            stream = slow.stream("a", SamplingParams(max_tokens=2000))
            next(iter(stream))
            assert server.num_held == 1
            stream.close()  # type: ignore[attr-defined]
            steps = server.num_steps
            while server.num_held and server.num_steps < steps + 50:
                pass
            assert server.num_steps <= steps + 2
    finally:
        server.close()


def test_typed_results(client: Client) -> None:
    assert client.health()
    assert client.ready()
    client.wait_ready(1.0)
    (card,) = client.models()
    assert (card.id, card.max_model_len) == ("toy", 2048)
    load = client.expert_load()
    assert (len(load.rows), len(load.rows[0]), len(load.rows[0][0])) == (2, load.num_layers, load.num_experts)
    assert len(load.routed) == load.num_layers


def test_progress_bar(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.generate(["a", "b"], SamplingParams(max_tokens=5))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "10 tokens" in shown
    assert "tokens/s" in shown


def test_errors_are_typed(toy: ToyServer, client: Client) -> None:
    with pytest.raises(RequestError, match="maximum context length is 2048") as refused:
        client.generate("a b " * 3000, use_tqdm=False)
    assert (refused.value.status, refused.value.param) == (400, "prompt")
    with pytest.raises(RequestError, match="2 sampling_params came for 1"):
        client.generate("a", [SamplingParams(), SamplingParams()], use_tqdm=False)
    with pytest.raises(ConfigError, match="must look like"):
        Client("localhost:8000")
    with Client("http://127.0.0.1:9") as nowhere:
        assert not nowhere.health()
        with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
            nowhere.models()
        with pytest.raises(ServerUnreachable, match=r"not ready within 0\.1 s"):
            nowhere.wait_ready(0.1)
    with Client(f"{toy.url}/elsewhere") as wrong, pytest.raises(RequestError, match="no route"):
        wrong.models()


def test_keys_and_queues() -> None:
    server = ToyServer(api_key="secret", limits=ServerLimits(max_queued=2))
    try:
        with Client(server.url) as keyless:
            assert keyless.health()
            with pytest.raises(AuthenticationFailed, match="no API key"):
                keyless.generate("a", use_tqdm=False)
        with Client(server.url, api_key="secret") as client:
            with pytest.raises(RequestError, match="3 sequences; the limit is 2"):
                client.generate(["a"] * 3, use_tqdm=False)
            stream = client.stream("a", SamplingParams(max_tokens=2000, n=2))
            next(iter(stream))
            with pytest.raises(ServerBusy, match="queue is full") as busy:
                client.generate("a", use_tqdm=False)
            assert busy.value.status == 429
            assert busy.value.retry_after_s is not None
            stream.close()  # type: ignore[attr-defined]
            server.core.set_ready(None)
            assert not client.ready()
            with pytest.raises(ServerBusy, match="not ready"):
                client.generate("a", use_tqdm=False)
    finally:
        server.close()


def test_a_cluster_without_ranks_fails_its_requests_with_the_reason() -> None:
    server = ToyServer(num_ranks=1, step_s=0.01)
    try:
        with Client(server.url) as client:
            stream = client.stream("a", SamplingParams(max_tokens=2000))
            next(iter(stream))
            server.on_loop(lambda: server.core.fail_all("rank 0 was killed by SIGKILL"))
            with pytest.raises(RankFailed, match="rank 0 was killed by SIGKILL"):
                list(stream)
            body = {"prompt": "a", "max_tokens": 2000, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, trust_env=False) as response:
                lines = response.iter_lines()
                next(lines)
                server.on_loop(lambda: server.core.fail_all("no rank is left"))
                rest = [line for line in lines if line]
            assert '"error":{"message":"no rank is left"' in rest[-2]
            assert rest[-1] == "data: [DONE]"
    finally:
        server.close()


def test_an_answer_that_is_something_else_says_so() -> None:
    with pytest.raises(ServerError, match="not its protocol"):
        http_calls.expert_load_of(b"<html>")


def test_async_verbs(toy: ToyServer) -> None:
    async def verbs() -> None:
        async with AsyncClient(toy.url) as client:
            assert await client.health()
            await client.wait_ready(1.0)
            assert (await client.models())[0].id == "toy"
            assert (await client.expert_load()).num_layers == 2
            outputs = await client.generate(["a", "b"], SamplingParams(max_tokens=9), use_tqdm=False)
            for text, output in zip("ab", outputs, strict=True):
                check_toy(toy, output, toy.tokenizer.encode(text))
            streams = [client.stream([5, i], SamplingParams(max_tokens=40, seed=i)) for i in range(3, 19)]

            async def tokens(i: int) -> list[int]:
                return [token for delta in [d async for d in streams[i]] for token in delta.token_ids]

            results = await asyncio.gather(*(tokens(i) for i in range(16)))
            assert results == [toy_tokens([5, i], i, 40) for i in range(3, 19)]
            with pytest.raises(RequestError, match="context length"):
                await client.generate("x" * 100_000, use_tqdm=False)
            async with aclosing(client.stream("a", SamplingParams(max_tokens=2000))) as stream:
                async for _ in stream:
                    break
        while toy.num_held:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(verbs(), 30))


def test_the_client_imports_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from switchgear import AsyncClient, Client, SamplingParams\n"
        "heavy = {'torch', 'ray', 'numpy', 'starlette', 'uvicorn', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
