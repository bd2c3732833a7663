"""What a user calls a conversation, checked and made plain for a chat template: `parse_messages`, `chat_prompt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import RequestError

KWARGS_MAX = 16
KWARG_CHARS_MAX = 256
INTEGER_MAX = 1 << 16  # a template may count up to it
RESERVED_KWARGS = frozenset({"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"})


def parse_messages(messages: object) -> list[dict[str, Any]]:
    """OpenAI's messages with each content a string. RequestError for what is not text.

    Example: [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}] -> [{"role": "user", "content": "Hi"}]
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages must be an array with at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def chat_prompt(
    tokenizer: Tokenizer | None,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt a conversation makes. Its special tokens are in the text: encode it with add_special=False."""
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer, so it takes token ids, not messages", param="messages")
    template = tokenizer.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template, so it takes prompts, not messages: use /v1/completions, or serve it "
            "with --chat-template FILE",
            param="messages",
        )
    parsed = parse_messages(messages)
    if "developer" not in template.source:  # OpenAI's newer word; a template would drop or refuse it
        parsed = [{**one, "role": "system"} if one["role"] == "developer" else one for one in parsed]
    return template.render(
        parsed,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        extra=_checked_kwargs(chat_template_kwargs or {}),
    )


def _message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{name} must be an object with role and content", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{name}.role={role!r} must be a string such as 'user'", param="messages")
    parsed: dict[str, Any] = {"role": role, "content": _text(message.get("content"), f"{name}.content")}
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if isinstance(message.get(key), str):
            parsed[key] = message[key]
    if message.get("tool_calls"):  # of an earlier turn: text for the template
        parsed["tool_calls"] = [_tool_call(call, name) for call in message["tool_calls"]]
    return parsed


def _text(content: object, name: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{name} must be a string or an array of text parts", param="messages")
    texts: list[str] = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{name}[{i}] has type {kind!r}; this server takes text only: {{'type': 'text', 'text': '...'}}",
                param="messages",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{name}.tool_calls must hold objects with a function", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI sends JSON in a string, templates want the object
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise RequestError(f"{name}.tool_calls: the arguments are not JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _checked_kwargs(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Switches for the template, such as enable_thinking: a few plain values, so that no request can make it work hard."""
    if len(values) > KWARGS_MAX:
        raise RequestError(
            f"chat_template_kwargs has {len(values)} entries; the limit is {KWARGS_MAX}", param="chat_template_kwargs"
        )
    for name, value in values.items():
        if name in RESERVED_KWARGS:
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}; the server does", param="chat_template_kwargs"
            )
        plain = (
            value is None
            or isinstance(value, (bool, float))
            or (isinstance(value, int) and abs(value) <= INTEGER_MAX)
            or (isinstance(value, str) and len(value) <= KWARG_CHARS_MAX)
        )
        if not plain:
            raise RequestError(
                f"chat_template_kwargs[{name!r}] must be null, a boolean, a number up to {INTEGER_MAX} or a string of "
                f"at most {KWARG_CHARS_MAX} characters",
                param="chat_template_kwargs",
            )
    return values
