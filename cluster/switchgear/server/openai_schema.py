"""The JSON bodies of OpenAI's routes and of vLLM's small ones, as msgspec types. Unknown fields are ignored, as by vLLM."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from switchgear.server.schema import Body, ChatFields, CommonSampling, schema_error
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import ITEMS_MAX

Value = TypeVar("Value")


def given(field: Value | UnsetType | None) -> Value | None:
    """A field's value; absent and null are one."""
    return None if isinstance(field, UnsetType) else field


class StreamOptions(msgspec.Struct, kw_only=True):
    """`continuous_usage_stats` is vLLM's: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIRequest(CommonSampling, kw_only=True):
    """What completions and chat share. The last block is refused: ignoring it would change what the answer means."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: bool | None = None

    def refuse_unsupported(self) -> None:
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise RequestError(
                f"response_format={kind!r} is not supported: nothing here constrains the text; "
                "leave it out, or send {'type': 'text'}",
                param="response_format",
            )
        for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if getattr(self, name) is not None:
                raise RequestError(
                    f"{name} is not supported: nothing here constrains the text; leave it out", param=name
                )
        if self.use_beam_search:
            raise RequestError("use_beam_search is not supported; leave it out", param="use_beam_search")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options may be given only with stream=true", param="stream_options")
        if self.stream and given(self.prompt_logprobs) is not None:
            raise RequestError(
                "prompt_logprobs come with stream=false only; set that, or leave them out", param="prompt_logprobs"
            )


class CompletionRequest(OpenAIRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], msgspec.Meta(max_length=ITEMS_MAX)]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class ChatRequest(OpenAIRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool | None = None  # these three as in ChatFields: a Struct has one base
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | UnsetType | None = UNSET
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None


class TokenizeRequest(ChatFields, kw_only=True):
    """POST /tokenize: `prompt`, or `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def decode_json(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise schema_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
