"""The forms in which Python callers give prompts and parameters, made one: `normalize_prompts`, `normalize_params`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import SamplingParams

Prompt = str | list[int]
PromptLike = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


def normalize_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[Prompt]:
    """One prompt or a list; a prompt is text, token ids, or vLLM's {"prompt": ...} or {"prompt_token_ids": ...}."""
    if isinstance(prompts, (str, Mapping)):
        return [_prompt(prompts)]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [_prompt(items)]  # type: ignore[arg-type]
    return [_prompt(item) for item in items]  # type: ignore[arg-type]


def normalize_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """One conversation or a list of them; a conversation is a list of {"role", "content"}."""
    items: list[Any] = list(messages)
    if items and all(isinstance(item, Mapping) for item in items):
        return [items]
    if not all(isinstance(item, Sequence) and not isinstance(item, str) for item in items):
        raise RequestError("messages must be one conversation or a list of them", param="messages")
    return [list(item) for item in items]


def normalize_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One for all, one each, or None for the defaults."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"{len(params)} sampling_params came for {num_prompts} prompts; give one, or one per prompt",
            param="sampling_params",
        )
    return list(params)


def _prompt(prompt: PromptLike) -> Prompt:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt") or ""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        token_ids = [item for item in prompt if isinstance(item, int)]
        if len(token_ids) == len(prompt):
            return token_ids
    raise RequestError(f"a prompt is text or a list of token ids, not {type(prompt).__name__}", param="prompt")
