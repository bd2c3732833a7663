"""What every route needs: `Frontend`, the core behind the routes and the path from a body to a running request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from switchgear.conversation import chat_prompt
from switchgear.server.admission import Admission
from switchgear.server.body import BodyReader
from switchgear.server.containers import check_json
from switchgear.server.core import ServerCore
from switchgear.server.delta_stream import DeltaStream
from switchgear.server.events import SequenceEvent
from switchgear.server.openai_schema import ChatRequest, decode_json
from switchgear.server.request import Request
from switchgear.server.schema import Body, ChatFields
from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import SamplingParams

Result = TypeVar("Result")

_THREAD_FROM_CHARS = 1 << 14  # about 5 ms of tokenizing; more would hold up everybody's tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontend:
    core: ServerCore
    model_name: str
    created_s: int
    bodies: BodyReader = field(default_factory=BodyReader)

    async def read(self, http: HttpRequest) -> bytes:
        return await self.bodies.read(http, self.core.limits)

    async def read_json(self, http: HttpRequest, kind: type[Body]) -> Body:
        body = await self.read(http)
        await check_json(body)
        return decode_json(body, kind)

    def check_model(self, name: str | None) -> None:
        """None is the one model we have."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}", param="model", status=404
            )

    def check_salt(self, cache_salt: str | None) -> None:
        if cache_salt is not None and len(cache_salt) > self.core.limits.max_cache_salt_chars:
            raise RequestError(
                f"cache_salt has {len(cache_salt)} characters; the limit is {self.core.limits.max_cache_salt_chars}",
                param="cache_salt",
            )

    async def check(
        self, prompts: object, params: SamplingParams | Sequence[SamplingParams], *, add_special: bool = True
    ) -> list[Admission]:
        """The core's `check`, on a thread if the prompts are long."""
        self.core.require_ready()
        items = prompts if isinstance(prompts, list) else [prompts]
        size = len(items)
        if size <= self.core.limits.max_prompts_per_request:
            size += sum(len(item) for item in items if isinstance(item, (str, list)))
        return await aside(size, lambda: self.core.check(prompts, params, add_special=add_special))

    async def chat_prompt(self, messages: list[dict[str, Any]], fields: ChatFields | ChatRequest) -> str:
        """The text a conversation makes, on a thread if that is long."""
        return await aside(_num_chars(messages), lambda: self.render(messages, fields))

    def render(self, messages: list[dict[str, Any]], fields: ChatFields | ChatRequest) -> str:
        goes_on = bool(fields.continue_final_message)
        adds = fields.add_generation_prompt
        return chat_prompt(
            self.core.tokenizer,
            messages,
            add_generation_prompt=not goes_on if adds is None else adds,
            continue_final_message=goes_on,
            chat_template_kwargs=fields.chat_template_kwargs,
        )

    def start(self, admissions: list[Admission], cache_salt: str | None) -> Run:
        """Admit; what comes of it is in the Run."""
        num_sequences = sum(admission.params.n for admission in admissions)
        stream = DeltaStream(num_sequences, max_logprobs=self.core.limits.max_unread_logprobs)
        request = self.core.admit(admissions, sink=stream.put, cache_salt=cache_salt or "")
        run = Run(core=self.core, request=request, stream=stream)
        stream.on_overflow = run.abort
        return run


async def aside(size: int, work: Callable[[], Result]) -> Result:
    """Work that grows with the `size` of texts (characters) and lists, here or on a thread."""
    return work() if size < _THREAD_FROM_CHARS else await asyncio.to_thread(work)


def _num_chars(messages: list[dict[str, Any]]) -> int:
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return sum(len(content if isinstance(content, str) else str(content)) for content in contents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A started request and its news."""

    core: ServerCore
    request: Request
    stream: DeltaStream

    @property
    def done(self) -> bool:
        return self.stream.done

    async def read(self, timeout_s: float) -> list[SequenceEvent]:
        return await self.stream.read(timeout_s)

    def abort(self) -> None:
        """End what is left. Idempotent: also right after the last token."""
        self.core.abort(self.request.request_id)
