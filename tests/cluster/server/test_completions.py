"""/v1/completions over real sockets and toy ranks: OpenAI's shape, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from toy_server import ToyServer, toy_tokens


def post(toy: ToyServer, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{toy.url}/v1/completions", json=body, trust_env=False)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    result: dict[str, Any] = response.json()
    return result


def stream(toy: ToyServer, **body: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    url = f"{toy.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert line.startswith("data: ")
        events.append(json.loads(line[6:]))
    return events


def test_the_shape(toy: ToyServer) -> None:
    prompt = toy.tokenizer.encode("hello")
    body = post(toy, model="toy", prompt="hello", max_tokens=5, seed=3)
    assert body.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (body["object"], body["model"]) == ("text_completion", "toy")
    assert body["id"].startswith("cmpl-")
    text = toy.tokenizer.decode(toy_tokens(prompt, 3, 5))
    assert body["choices"] == [
        {"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": None, "seed": 3}
    ]
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 5,
        "total_tokens": len(prompt) + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_and_choices_are_numbered(toy: ToyServer) -> None:
    body = post(toy, prompt=[[5, 6], [7]], n=2, max_tokens=4, return_token_ids=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice, prompt in zip(body["choices"], [[5, 6], [5, 6], [7], [7]], strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == toy_tokens(prompt, choice["seed"], 4)  # the seed it names gives it again
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16


def test_null_fields_are_absent_fields(toy: ToyServer) -> None:
    body = post(
        toy, prompt="a", max_tokens=None, temperature=None, stop=None, logprobs=None, n=None, user="me", odd=[1]
    )
    assert body["usage"]["completion_tokens"] == 16


def test_logprobs(toy: ToyServer) -> None:
    body = post(toy, prompt=[9], max_tokens=3, logprobs=2, seed=1)
    logprobs = body["choices"][0]["logprobs"]
    tokens = toy_tokens([9], 1, 3)
    assert logprobs["tokens"] == [toy.tokenizer.token_text(i) for i in tokens]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    for token_id, top in zip(tokens, logprobs["top_logprobs"], strict=True):
        texts = [toy.tokenizer.token_text(token_id), toy.tokenizer.token_text(token_id + 1)]
        assert top == {texts[1]: -1.5} | {texts[0]: -0.5}
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [0, lengths[0], lengths[0] + lengths[1]]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": 2}, {"stop": ["e"]}, {"prompt": ["x", [5, 6]]}])
def test_streamed_equals_whole(toy: ToyServer, fields: dict[str, Any]) -> None:
    request = {"prompt": "some prompt", "max_tokens": 40, "seed": 77, "return_token_ids": True, **fields}
    whole = post(toy, **request)
    chunks = stream(toy, **request, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for expected in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [i for part in parts for i in part["token_ids"]] == expected["token_ids"]
        assert [part["finish_reason"] for part in parts][:-1] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        if "logprobs" in fields:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [i for part in parts for i in part["logprobs"][name]] == expected["logprobs"][name]


def test_no_usage_unless_asked(toy: ToyServer) -> None:
    chunks = stream(toy, prompt="a", max_tokens=2)
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_small_routes(toy: ToyServer) -> None:
    with httpx.Client(base_url=toy.url, trust_env=False) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json()["ranks"] == 2
        models = http.get("/v1/models").json()
        assert [card["id"] for card in models["data"]] == ["toy"]
        assert http.get("/v1/models/toy").json() == models["data"][0]
        assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_metrics_count(toy: ToyServer) -> None:
    def values() -> dict[str, float]:
        text = httpx.get(f"{toy.url}/metrics", trust_env=False).text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = values()
    post(toy, prompt=[5, 6, 7], n=2, max_tokens=10)
    after = values()
    assert (
        after['switchgear:generation_tokens_total{model_name="toy"}']
        - before['switchgear:generation_tokens_total{model_name="toy"}']
        == 20
    )
    success = 'switchgear:request_success_total{finished_reason="length",model_name="toy"}'
    assert after[success] - before[success] == 2
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        count = f'switchgear:{name}_count{{model_name="toy"}}'
        assert after[count] - before[count] == {"inter_token_latency_seconds": 18}.get(name, 2)
    assert after['switchgear:num_requests_running{model_name="toy",rank="0"}'] == 0
    assert after['switchgear:generation{model_name="toy"}'] == 1
    assert after['switchgear:expert_rows_total{model_name="toy",rank="1"}'] > 0
    assert after['switchgear:expert_balancedness{layer="1",model_name="toy"}'] > 0
