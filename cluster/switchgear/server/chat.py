"""POST /v1/chat/completions, in OpenAI's shape with vLLM's extra fields: `Chat`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from switchgear.server.admission import Admission
from switchgear.server.events import SequenceEvent
from switchgear.server.frontend import Frontend, Run
from switchgear.server.logprob_body import chat_logprobs, prompt_logprobs
from switchgear.server.openai_schema import ChatRequest, given
from switchgear.server.reply import Choice, Key, Reply, respond
from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import SamplingParams


class Chat:
    """One instance per server; `post` is the endpoint, `start` the same for a caller in this process."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def post(self, http: Request) -> Response:
        return await respond(http, self._frontend, ChatRequest, self.start)

    async def start(self, body: ChatRequest) -> ChatReply:
        """Admit the request; what comes of it is in the reply."""
        body.refuse_unsupported()
        _refuse_unsupported(body)
        self._frontend.check_model(body.model)
        self._frontend.check_salt(body.cache_salt)
        params = _params(body)
        prompt = await self._frontend.chat_prompt(body.messages, body)
        try:
            admissions = await self._frontend.check(prompt, params, add_special=False)
        except RequestError as error:  # what the client sent are messages
            param = "messages" if error.param == "prompt" else error.param
            raise RequestError(str(error), param=param, status=error.status) from None
        run = self._frontend.start(admissions, body.cache_salt)
        return ChatReply(self._frontend, body, admissions, run)


def _params(body: ChatRequest) -> SamplingParams:
    """Without a limit an answer may be as long as fits."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    max_tokens = given(body.max_completion_tokens)
    max_tokens = given(body.max_tokens) if max_tokens is None else max_tokens
    try:
        return body.sampling(max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    except RequestError as error:
        renamed = {"logprobs": "top_logprobs"}
        if error.param == "max_tokens" and given(body.max_completion_tokens) is not None:
            renamed["max_tokens"] = "max_completion_tokens"
        if error.param not in renamed:
            raise
        name = renamed[error.param]
        raise RequestError(str(error).replace(error.param, name, 1), param=name) from None


class ChatReply(Reply):
    """One choice per n, each a message."""

    def __init__(self, frontend: Frontend, body: ChatRequest, admissions: list[Admission], run: Run) -> None:
        super().__init__(frontend, body, admissions, run, id_prefix="chatcmpl")
        self.head["object"] = "chat.completion"
        self._body: ChatRequest = body
        self._begun: set[int] = set()

    def whole_body(self, choices: dict[Key, Choice]) -> dict[str, Any]:
        body: dict[str, Any] = {
            **self.head,
            "choices": [self._whole_choice(key[1], choice) for key, choice in sorted(choices.items())],
        }
        if given(self._body.prompt_logprobs) is not None:
            body["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self.prompt_logprobs[0])
        if self._body.return_token_ids:
            body["prompt_token_ids"] = self.admissions[0].prompt_token_ids
        return body

    @property
    def stream_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def chunks(self, delta: SequenceEvent) -> Iterator[dict[str, Any]]:
        """The role, then the text as it comes, then an empty delta with the reason."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._chunk(delta.index, {"role": "assistant", "content": "", "refusal": None})
        scored = chat_logprobs(self.tokenizer, delta.logprobs) if delta.logprobs else None
        if delta.text or scored or (delta.token_ids and self._body.return_token_ids):
            fields = {"token_ids": delta.token_ids} if self._body.return_token_ids else {}
            yield self._chunk(delta.index, {"content": delta.text}, logprobs=scored, **fields)
        if delta.finish is not None:
            yield self._chunk(delta.index, {}, **self.finish_fields(delta.finish))

    def _chunk(self, index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        return {**self.stream_head, "choices": [choice]}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        whole: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(self.tokenizer, choice.logprobs) if self._body.logprobs else None,
            **self.finish_fields(choice.finish),
        }
        if self._body.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole


def _refuse_unsupported(body: ChatRequest) -> None:
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise RequestError(f"{name} are not supported: no model here calls them; leave {name} out", param=name)
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none", "auto"):
            raise RequestError(f"{name} needs tools, which are not supported; leave it out", param=name)
    if body.chat_template is not None:
        raise RequestError(
            "chat_template may not come with a request; serve the model with --chat-template FILE",
            param="chat_template",
        )
    if body.audio is not None or any(kind != "text" for kind in body.modalities or ()):
        raise RequestError("modalities other than text are not supported; leave them out", param="modalities")
    if body.web_search_options is not None:
        raise RequestError("web_search_options is not supported; leave it out", param="web_search_options")
