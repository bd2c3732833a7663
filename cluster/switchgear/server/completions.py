"""POST /v1/completions, in OpenAI's shape with vLLM's extra fields: `Completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from switchgear.server import sse
from switchgear.server.admission import Admission
from switchgear.server.body import read_body
from switchgear.server.completion_body import ChoiceLogprobs, usage
from switchgear.server.errors import body_of
from switchgear.server.events import Finish, SequenceEvent
from switchgear.server.frontend import Frontend, Run
from switchgear.server.push_response import PushResponse, unless_disconnected
from switchgear.server.schema import CompletionRequest, decode_json
from switchgear_runtime.errors import RequestError, SwitchgearError

Key = tuple[int, int]  # prompt index, choice index


class Completions:
    """One instance per server; `post` is the endpoint."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def post(self, http: Request) -> Response:
        body = decode_json(await read_body(http, self._frontend.core.limits.max_body_bytes), CompletionRequest)
        _refuse_unsupported(body)
        self._frontend.check_model(body.model)
        params = body.to_params(null_max_tokens=False)
        admissions = await self._frontend.check(body.prompt, params)
        run = self._frontend.start(admissions, body.cache_salt)
        reply = _Reply(self._frontend, body, admissions, run)
        if body.stream:
            return PushResponse(reply.stream(), media_type="text/event-stream", on_end=run.abort)
        try:
            whole = await unless_disconnected(http, reply.whole())
        finally:
            run.abort()
        return Response(msgspec.json.encode(whole), media_type="application/json")


class _Reply:
    """The response to one request, whole or as chunks."""

    def __init__(self, frontend: Frontend, body: CompletionRequest, admissions: list[Admission], run: Run) -> None:
        self._admissions = admissions
        self._run = run
        self._body = body
        self._n = admissions[0].params.n
        self._head = {
            "id": f"cmpl-{run.request.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": frontend.model_name,
        }
        tokenizer = frontend.core.tokenizer
        self._logprobs = {(i, j): ChoiceLogprobs(tokenizer) for i in range(len(admissions)) for j in range(self._n)}
        self._finishes: dict[Key, Finish] = {}

    async def whole(self) -> dict[str, Any]:
        texts: dict[Key, list[str]] = {key: [] for key in self._logprobs}
        token_ids: dict[Key, list[int]] = {key: [] for key in self._logprobs}
        parts: dict[Key, list[dict[str, Any]]] = {key: [] for key in self._logprobs}
        while not self._run.done:
            for delta in await self._run.read(sse.KEEP_ALIVE_S):
                self._note(delta)
                key = (delta.prompt_index, delta.index)
                texts[key].append(delta.text)
                token_ids[key] += delta.token_ids
                if delta.logprobs is not None:
                    parts[key].append(self._logprobs[key].object_of(delta.logprobs))
        choices = [
            self._choice(
                key, "".join(texts[key]), token_ids[key], ChoiceLogprobs.joined(parts[key]), self._finishes[key]
            )
            for key in sorted(self._logprobs)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._finishes)}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        extra = {"usage": None} if with_usage else {}
        try:
            while not self._run.done:
                chunks = []
                for delta in await self._run.read(sse.KEEP_ALIVE_S):
                    self._note(delta)
                    key = (delta.prompt_index, delta.index)
                    logprobs = None if delta.logprobs is None else self._logprobs[key].object_of(delta.logprobs)
                    choice = self._choice(key, delta.text, delta.token_ids, logprobs, delta.finish)
                    chunks.append(sse.data({**self._head, "choices": [choice], **extra}))
                yield b"".join(chunks) or sse.KEEP_ALIVE
        except SwitchgearError as error:
            yield sse.data(body_of(error)) + sse.DONE
            return
        if with_usage:
            yield sse.data({**self._head, "choices": [], "usage": usage(self._finishes)})
        yield sse.DONE

    def _note(self, delta: SequenceEvent) -> None:
        if delta.finish is None:
            return
        if delta.finish.error is not None:
            raise delta.finish.error
        self._finishes[delta.prompt_index, delta.index] = delta.finish

    def _choice(
        self, key: Key, text: str, token_ids: list[int], logprobs: dict[str, Any] | None, finish: Finish | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": key[0] * self._n + key[1],
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish.reason if finish else None,
        }
        if finish is not None:
            choice["stop_reason"] = finish.stop_reason
            choice["seed"] = finish.seed
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
            if finish is not None:
                choice["prompt_token_ids"] = self._admissions[key[0]].prompt_token_ids
        return choice


def _refuse_unsupported(body: CompletionRequest) -> None:
    if body.echo:
        raise RequestError("echo=true is not supported; prepend the prompt yourself", param="echo")
    if body.suffix:
        raise RequestError("suffix is not supported; leave it out", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported; ask for n choices instead", param="best_of")
