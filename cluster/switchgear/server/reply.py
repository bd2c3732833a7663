"""The answer to an OpenAI request, whole or streamed: `Reply`, and `respond`, the way from a body to it.

What completions and chat have in common.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from switchgear.server import sse
from switchgear.server.admission import Admission
from switchgear.server.errors import body_of
from switchgear.server.events import Finish, SequenceEvent, TokenLogprob
from switchgear.server.frontend import Frontend, Run
from switchgear.server.openai_schema import OpenAIRequest
from switchgear.server.push_response import PushResponse, unless_disconnected
from switchgear.server.usage import Usage
from switchgear_runtime.errors import SwitchgearError

Key = tuple[int, int]  # prompt index, choice index
Body = TypeVar("Body", bound=OpenAIRequest)


@dataclass(slots=True, eq=False)
class Choice:
    """All that one sequence gave."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Reply(ABC):
    """One started request and the JSON that comes of it."""

    def __init__(
        self, frontend: Frontend, body: OpenAIRequest, admissions: list[Admission], run: Run, *, id_prefix: str
    ) -> None:
        self.run = run
        self.admissions = admissions
        self.tokenizer = frontend.core.tokenizer
        self.usage = Usage(admissions)
        self.prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in admissions]
        self.head = {
            "id": f"{id_prefix}-{run.request.request_id}",
            "object": "",
            "created": int(time.time()),
            "model": frontend.model_name,
            "system_fingerprint": frontend.core.system_fingerprint,
        }
        self._body = body

    async def whole(self) -> dict[str, Any]:
        """Raises the error of the first sequence that failed."""
        choices: dict[Key, Choice] = {
            (i, j): Choice() for i, admission in enumerate(self.admissions) for j in range(admission.params.n)
        }
        while not self.run.done:
            for delta in await self.run.read(sse.KEEP_ALIVE_S):
                self._note(delta)
                choice = choices[delta.prompt_index, delta.index]
                choice.texts.append(delta.text)
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs or ()
                choice.finish = delta.finish
                self.prompt_logprobs[delta.prompt_index] += delta.prompt_logprobs or ()
        return {**self.whole_body(choices), "usage": self.usage.object()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        continuous = with_usage and bool(options and options.continuous_usage_stats)
        try:
            while not self.run.done:
                chunks = []
                for delta in await self.run.read(sse.KEEP_ALIVE_S):
                    self._note(delta)
                    extra = {"usage": self.usage.object() if continuous else None} if with_usage else {}
                    chunks += [sse.data({**chunk, **extra}) for chunk in self.chunks(delta)]
                yield b"".join(chunks) or sse.KEEP_ALIVE
        except SwitchgearError as error:
            yield sse.data(body_of(error)) + sse.DONE
            return
        if with_usage:
            yield sse.data({**self.stream_head, "choices": [], "usage": self.usage.object()})
        yield sse.DONE

    @abstractmethod
    def whole_body(self, choices: dict[Key, Choice]) -> dict[str, Any]:
        """The answer but for its usage."""

    @property
    @abstractmethod
    def stream_head(self) -> dict[str, Any]:
        """What every chunk begins with."""

    @abstractmethod
    def chunks(self, delta: SequenceEvent) -> Iterator[dict[str, Any]]:
        """What a delta becomes, in order; perhaps nothing."""

    def finish_fields(self, finish: Finish | None) -> dict[str, Any]:
        """OpenAI's reason; vLLM's stop_reason; and the seed that gives these tokens again."""
        if finish is None:
            return {"finish_reason": None}
        return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason, "seed": finish.seed}

    def _note(self, delta: SequenceEvent) -> None:
        self.usage.note(delta)
        if delta.finish is not None and delta.finish.error is not None:
            raise delta.finish.error


async def respond(
    http: Request, frontend: Frontend, kind: type[Body], start: Callable[[Body], Awaitable[Reply]]
) -> Response:
    """Read and check the body, start it, and send what comes; a client that goes away ends its request."""
    body = await frontend.read_json(http, kind)
    reply = await start(body)
    if body.stream:
        return PushResponse(reply.stream(), media_type="text/event-stream", on_end=reply.run.abort)
    try:
        whole = await unless_disconnected(http, reply.whole())
    finally:
        reply.run.abort()
    return Response(msgspec.json.encode(whole), media_type="application/json")
