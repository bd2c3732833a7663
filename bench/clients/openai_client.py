"""The `openai` package, unchanged, against a server: each check is one call and what must hold of its answer.

Run in an environment with `openai`: `python openai_client.py URL MODEL RESULTS.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

PROMPT = "The king said unto the people,"
MESSAGES: Any = [{"role": "system", "content": "Answer in one line."}, {"role": "user", "content": "Who is there?"}]
Check = Callable[[openai.OpenAI, str], None]


def chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=16, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens <= 16


def chat_stream(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    parts, usage, reasons = [], None, []
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
    assert "".join(parts) == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def chat_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=6, logprobs=True, top_logprobs=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert token.bytes is not None


def completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("length", "stop")


def completion_stream(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**options).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert whole.logprobs is not None
    tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens or ()]
    assert tokens == whole.logprobs.tokens


def completion_logprobs(client: openai.OpenAI, model: str) -> None:
    logprobs = client.completions.create(model=model, prompt=PROMPT, max_tokens=5, logprobs=4).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None and logprobs.text_offset is not None
    assert all(4 <= len(top) <= 5 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0


def echo(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens or ()) == PROMPT


def several_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    several = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=8, n=2, seed=7)
    assert [choice.index for choice in several.choices] == [0, 1]


def best_of(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, n=2, best_of=5, seed=7, logprobs=0)
    sums = [sum(choice.logprobs.token_logprobs or ()) for choice in answer.choices if choice.logprobs]
    assert len(sums) == 2 and sums[0] >= sums[1]
    assert answer.usage is not None and answer.usage.completion_tokens > 16


def stop(client: openai.OpenAI, model: str) -> None:
    text = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    word = text.split()[2]
    choice = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, temperature=0, stop=[word]).choices[0]
    assert choice.text == text[: text.index(word)]
    assert choice.finish_reason == "stop"


def seed(client: openai.OpenAI, model: str) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=24, seed=seed).choices[0].text

    assert text(11) == text(11) != text(12)


def prompt_forms(client: openai.OpenAI, model: str) -> None:
    for prompt in (PROMPT, [PROMPT, "Once"], [5, 6, 7], [[5, 6], [7]]):
        options: Any = {"prompt": prompt}
        answer = client.completions.create(model=model, max_tokens=2, **options)
        assert len(answer.choices) == (1 if prompt in (PROMPT, [5, 6, 7]) else 2)


def cached_tokens(client: openai.OpenAI, model: str) -> None:
    prompt = list(range(100, 180))
    for _ in range(2):
        usage = client.completions.create(model=model, prompt=prompt, max_tokens=1).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 64


def models(client: openai.OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).owned_by == "switchgear"


def errors(client: openai.OpenAI, model: str) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    refused: list[tuple[type[openai.APIStatusError], str, dict[str, Any]]] = [
        (openai.NotFoundError, "model", {"model": "nobody"}),
        (openai.BadRequestError, "tools", {"tools": tools}),
        (openai.BadRequestError, "response_format", {"response_format": {"type": "json_object"}}),
        (openai.BadRequestError, "top_logprobs", {"top_logprobs": 3}),
        (openai.BadRequestError, "messages", {"messages": []}),
    ]
    for kind, param, fields in refused:
        try:
            client.chat.completions.create(**{"model": model, "messages": MESSAGES, **fields})
        except kind as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{fields} was not refused")


def unknown_fields(client: openai.OpenAI, model: str) -> None:
    extra = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "no_such_field": [1]}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=9, extra_body=extra, user="me")
    assert answer.usage is not None and answer.usage.completion_tokens == 9


CHECKS: list[Check] = [
    chat,
    chat_stream,
    chat_logprobs,
    completion,
    completion_stream,
    completion_logprobs,
    echo,
    several_choices,
    best_of,
    stop,
    seed,
    prompt_forms,
    cached_tokens,
    models,
    errors,
    unknown_fields,
]


def main() -> int:
    url, model, results = sys.argv[1:]
    rows = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for check in CHECKS:
            start_s = time.perf_counter()
            try:
                check(client, model)
                failure = None
            except (AssertionError, openai.OpenAIError) as error:
                failure = f"{type(error).__name__}: {error}"
            rows.append(
                {"check": check.__name__, "failure": failure, "seconds": round(time.perf_counter() - start_s, 3)}
            )
            print(f"{check.__name__:20} {failure or 'ok'}")
    Path(results).write_text(json.dumps({"openai": openai.__version__, "checks": rows}, indent=1) + "\n")
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
