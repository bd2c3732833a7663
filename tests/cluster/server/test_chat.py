"""/v1/chat/completions, /tokenize and their neighbours over real sockets and toy ranks."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from toy_server import ToyServer, toy_tokens

from switchgear import AsyncClient, Client, SamplingParams
from switchgear_runtime.errors import RequestError

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
PROMPT = "System: Be kind.\n\nUser: Hi\n\nAssistant:"


def send(toy: ToyServer, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{toy.url}{path}", json=body, trust_env=False)


def chat(toy: ToyServer, **body: Any) -> dict[str, Any]:
    response = send(toy, **{"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def stream(toy: ToyServer, **body: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "stream": True, **body}
    with httpx.stream("POST", f"{toy.url}/v1/chat/completions", json=body, trust_env=False) as response:
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_the_shape(toy: ToyServer) -> None:
    prompt = toy.tokenizer.encode(PROMPT)
    body = chat(toy, model="toy", max_completion_tokens=5, seed=3, n=2, return_token_ids=True)
    assert (body["object"], body["prompt_token_ids"]) == ("chat.completion", prompt)
    first, second = body["choices"]
    text = toy.tokenizer.decode(toy_tokens(prompt, 3, 5))
    assert first["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (first["finish_reason"], first["logprobs"], first["seed"]) == ("length", None, 3)
    assert second["token_ids"] == toy_tokens(prompt, second["seed"], 5)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 10,
        "total_tokens": len(prompt) + 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_without_a_limit_an_answer_fills_the_context(toy: ToyServer) -> None:
    prompt = [{"role": "user", "content": "a " * 950}]
    usage = chat(toy, messages=prompt, max_tokens=None)["usage"]
    assert usage["total_tokens"] == 2048


def test_max_completion_tokens_goes_before_max_tokens(toy: ToyServer) -> None:
    assert chat(toy, max_tokens=9, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
    assert chat(toy, max_tokens=9)["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["e"]}])
def test_streamed_equals_whole(toy: ToyServer, fields: dict[str, Any]) -> None:
    request = {"max_completion_tokens": 40, "seed": 77, "return_token_ids": True, **fields}
    whole = chat(toy, **request)
    chunks = stream(toy, **request, stream_options={"include_usage": True})
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for expected in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in parts) == expected["message"]["content"]
        assert [i for part in parts for i in part.get("token_ids", ())] == expected["token_ids"]
        assert (parts[-1]["delta"], parts[-1]["finish_reason"]) == ({}, expected["finish_reason"])
        if fields.get("logprobs"):
            entries = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
            assert entries == expected["logprobs"]["content"]


def test_continuous_usage(toy: ToyServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [one["usage"]["completion_tokens"] for one in stream(toy, max_tokens=9, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 9


def test_logprobs_have_the_bytes_of_a_token(toy: ToyServer) -> None:
    entries = chat(toy, max_tokens=20, logprobs=True, top_logprobs=1, seed=5)["choices"][0]["logprobs"]["content"]
    for entry in entries:
        text = bytes(entry["bytes"]).decode(errors="replace")
        assert text == entry["token"] or "\ufffd" in entry["token"] or entry["token"].startswith("<|")
        assert len(entry["top_logprobs"]) == 1


def test_logprobs_without_alternatives(toy: ToyServer) -> None:
    entries = chat(toy, max_tokens=3, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[]] * 3


def test_forms_of_content(toy: ToyServer) -> None:
    parts = [{"type": "text", "text": "Hi"}]
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts, "name": "me"},
    ]
    assert chat(toy, messages=turns, max_tokens=1)["usage"] == chat(toy, max_tokens=1)["usage"]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "user", "content": "?"}]
    chat(toy, messages=history, max_tokens=1)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "messages: Expected"),
        ({"messages": ["hi"]}, "messages", "messages[0]: Expected object"),
        ({"messages": [{"content": "hi"}]}, "messages", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "takes text only",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "not valid JSON"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "--chat-template FILE"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "may not set"),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs", "must be null, a boolean"),
        ({"chat_template_kwargs": {"x": 10**9}}, "chat_template_kwargs", "must be null, a boolean"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21"),
        ({"logprobs": 3}, "logprobs", "logprobs: Expected bool"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens=0"),
        ({"max_tokens": 5000}, "max_tokens", "maximum context length"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages", "maximum context length"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    ],
)
def test_bad_fields(toy: ToyServer, fields: dict[str, Any], param: str | None, words: str) -> None:
    content = json.dumps({"messages": MESSAGES, "max_tokens": 2, **fields})
    response = httpx.post(f"{toy.url}/v1/chat/completions", content=content, trust_env=False)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"], error["message"]


def test_tolerated_fields(toy: ToyServer) -> None:
    chat(
        toy,
        max_tokens=1,
        user="me",
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
        store=False,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        no_such_field=[1],
    )


def test_tokenize_and_back(toy: ToyServer) -> None:
    text = "Grüße, 😀 world"
    tokens = toy.tokenizer.encode(text)
    answer = send(toy, "/tokenize", prompt=text, model="toy", return_token_strs=True).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (tokens, len(tokens), 2048)
    assert len(answer["token_strs"]) == len(tokens)
    assert send(toy, "/tokenize", messages=MESSAGES).json()["tokens"] == toy.tokenizer.encode(PROMPT)
    assert send(toy, "/detokenize", tokens=tokens).json() == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ):
        response = send(toy, path, **body)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["param"] == param


def test_version_and_tokenizer_info(toy: ToyServer) -> None:
    with httpx.Client(base_url=toy.url, trust_env=False) as http:
        assert http.get("/version").json()["version"]
        info = http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["model_max_length"]) == ("<|endoftext|>", 2048)
    assert "message.role" in info["chat_template"]


def test_a_model_without_a_template_says_so(toy: ToyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.tokenizer, "chat_template", None)
    response = send(toy, messages=MESSAGES)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_clients_chat(toy: ToyServer) -> None:
    import asyncio

    params = SamplingParams(max_tokens=4, seed=9)
    prompt = toy.tokenizer.encode(PROMPT)
    with Client(toy.url) as client:
        (one,) = client.chat(MESSAGES, params, use_tqdm=False)
        many = client.chat([MESSAGES, MESSAGES[1:]], params, use_tqdm=False)
        (going_on,) = client.chat(
            [*MESSAGES, {"role": "assistant", "content": "Well"}],
            params,
            use_tqdm=False,
            continue_final_message=True,
        )
        with pytest.raises(RequestError, match="messages"):
            client.chat([{"role": "user", "content": 5}], params, use_tqdm=False)
    assert (one.prompt, one.prompt_token_ids) == (None, prompt)
    assert one.outputs[0].token_ids == toy_tokens(prompt, 9, 4) == many[0].outputs[0].token_ids
    assert going_on.prompt_token_ids == toy.tokenizer.encode(PROMPT + " Well")

    async def again() -> list[int]:
        async with AsyncClient(toy.url) as client:
            return (await client.chat(MESSAGES, params, use_tqdm=False))[0].outputs[0].token_ids

    assert asyncio.run(again()) == one.outputs[0].token_ids
