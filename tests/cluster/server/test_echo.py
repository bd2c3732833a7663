"""echo, prompt logprobs, best_of and shared prefixes, against the real model: Transformers and our own other ways."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from tiny_checkpoints import BUNDLED, reference_logits, reference_model

from switchgear import LLM, Client, SamplingParams
from switchgear_runtime.errors import RequestError

pytestmark = pytest.mark.ranks

TEXT = "The king said unto the people, naïve 😀 and 7 * 8 = 56"


@pytest.fixture(scope="module")
def fp32() -> Iterator[LLM]:
    with LLM(ranks=2, launcher="local", dtype="float32", max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, trust_env=False, timeout=60) as client:
        yield client


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    import json

    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def test_prompt_logprobs_are_transformers(fp32: LLM) -> None:
    model = reference_model(BUNDLED)
    rng = random.Random(5)
    tokenizer = fp32.get_tokenizer()
    assert tokenizer is not None
    prompts = [tokenizer.encode(TEXT), [rng.randrange(4096) for _ in range(200)], [7], [7, 7]]
    outputs = fp32.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        scored = output.prompt_logprobs
        assert scored is not None and len(scored) == len(prompt)
        assert scored[0] is None
        expected = reference_logits(model, prompt).double().log_softmax(-1)
        for position, entry in enumerate(scored[1:]):
            assert entry is not None
            row = expected[position]
            assert set(entry) == {prompt[position + 1], *torch.topk(row, 2).indices.tolist()}
            for token_id, one in entry.items():
                assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-4)


def test_echo_of_a_text(http: httpx.Client) -> None:
    (choice,) = post(http, prompt=TEXT, max_tokens=4, echo=True, logprobs=1, temperature=0)["choices"]
    (plain,) = post(http, prompt=TEXT, max_tokens=4, logprobs=1, temperature=0)["choices"]
    assert choice["text"] == TEXT + plain["text"]
    logprobs = choice["logprobs"]
    num_prompt = len(logprobs["tokens"]) - 4
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][num_prompt:] == plain["logprobs"]["token_logprobs"]
    assert logprobs["tokens"][num_prompt:] == plain["logprobs"]["tokens"]
    assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])
    offsets = logprobs["text_offset"]
    assert offsets == [sum(map(len, logprobs["tokens"][:i])) for i in range(len(offsets))]


def test_echo_is_bitwise_what_generation_said(http: httpx.Client) -> None:
    """The logprobs of a greedy completion are those of the same tokens as a prompt; all are then the likeliest."""
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    generated = post(http, **body, return_token_ids=True)["choices"][0]
    whole = [5, 6, 7, *generated["token_ids"]]
    answer = post(http, prompt=whole, max_tokens=0, echo=True, logprobs=3)
    echoed = answer["choices"][0]["logprobs"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert echoed[name][3:] == generated["logprobs"][name]
    for logprob, top in zip(echoed["token_logprobs"][3:], echoed["top_logprobs"][3:], strict=True):
        assert logprob == max(top.values())  # how lm-eval decides is_greedy
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["finish_reason"] == "length"


def test_echo_of_many_prompts_in_one_request(http: httpx.Client) -> None:
    rng = random.Random(9)
    prompts = [[rng.randrange(4096) for _ in range(rng.randrange(1, 90))] for _ in range(12)]
    together = post(http, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234)["choices"]
    for prompt, choice in zip(prompts, together, strict=True):
        alone = post(http, prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"][0]
        assert choice["logprobs"] == alone["logprobs"]
        assert choice["text"] == alone["text"]
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_echo_equals_whole(http: httpx.Client, n: int) -> None:
    body = {"prompt": TEXT, "max_tokens": 6, "echo": True, "logprobs": 2, "seed": 5, "n": n}
    whole = post(http, **body)["choices"]
    pieces = stream(http, **body)
    for expected in whole:
        mine = [piece for piece in pieces if piece["index"] == expected["index"]]
        assert "".join(piece["text"] for piece in mine) == expected["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for piece in mine for item in piece["logprobs"][name]] == expected["logprobs"][name]


def test_echo_without_logprobs_and_nothing_generated(http: httpx.Client) -> None:
    choice = post(http, prompt=TEXT, max_tokens=0, echo=True)["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (TEXT, None)


def test_vllms_prompt_logprobs_field(http: httpx.Client) -> None:
    choice = post(http, prompt=[9, 10, 11], max_tokens=1, prompt_logprobs=1)["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert "10" in second and "11" in third
    assert {entry["rank"] for entry in second.values()} in ({1}, {1, None})


def test_clients_prompt_logprobs(http: httpx.Client, server_url: str) -> None:
    prompt = [random.Random(2).randrange(4096) for _ in range(50)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with Client(server_url) as client:
        (output,) = client.generate([prompt], params, use_tqdm=False)
    echoed = post(http, prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    scored = output.prompt_logprobs
    assert scored is not None and scored[0] is None
    own = [entry[token_id].logprob for entry, token_id in zip(scored[1:], prompt[1:], strict=True) if entry]
    assert own == echoed["token_logprobs"][1:]


def test_best_of_keeps_the_likeliest(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "max_tokens": 8, "seed": 3, "logprobs": 0, "ignore_eos": True}
    all_of_them = post(http, **body, n=6)["choices"]
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in all_of_them]
    order = sorted(range(6), key=lambda i: -sums[i])
    answer = post(http, **body, n=2, best_of=6)
    assert [choice["text"] for choice in answer["choices"]] == [all_of_them[i]["text"] for i in order[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 48
    quiet = post(http, **{**body, "logprobs": None}, n=2, best_of=6)["choices"]
    assert [choice["text"] for choice in quiet] == [choice["text"] for choice in answer["choices"]]
    assert quiet[0]["logprobs"] is None


def test_choices_share_their_prompt(fp32: LLM) -> None:
    """The others find what the first one computed, and draw what they would have drawn alone."""
    rng = random.Random(11)
    prompt = [rng.randrange(4096) for _ in range(160)]
    before = [state.stats.prefix_cache_hit_tokens for state in fp32._cluster.core.ranks.states()]
    (output,) = fp32.generate([prompt], SamplingParams(n=4, max_tokens=6, seed=8), use_tqdm=False)
    after = [state.stats.prefix_cache_hit_tokens for state in fp32._cluster.core.ranks.states()]
    assert sum(after) - sum(before) == 3 * 144
    alone = [SamplingParams(max_tokens=6, seed=completion.seed) for completion in output.outputs]
    for completion, other in zip(output.outputs, fp32.generate([prompt] * 4, alone, use_tqdm=False), strict=True):
        assert completion.token_ids == other.outputs[0].token_ids


def test_chat_and_its_prompt(fp32: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    message = {"role": "user", "content": [{"type": "text", "text": "Who is there?"}]}
    (output,) = fp32.chat([message], params, use_tqdm=False)
    assert output.prompt == "User: Who is there?\n\nAssistant:"
    (plain,) = fp32.generate(output.prompt, params, use_tqdm=False)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert len(fp32.chat([[message], [message]], params, use_tqdm=False)) == 2
    with pytest.raises(RequestError, match="role"):
        fp32.chat([{"content": "x"}], params)
