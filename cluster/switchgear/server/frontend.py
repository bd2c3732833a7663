"""What every route needs: `Frontend`, the core behind the routes and the path from a body to a running request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from switchgear.server.admission import Admission
from switchgear.server.core import Request, ServerCore
from switchgear.server.delta_stream import DeltaStream
from switchgear.server.events import SequenceEvent
from switchgear_runtime.errors import RequestError
from switchgear_runtime.sampling_params import SamplingParams

_THREAD_FROM_CHARS = 1 << 14  # about 5 ms of tokenizing; more would hold up everybody's tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontend:
    core: ServerCore
    model_name: str
    created_s: int

    def check_model(self, name: str | None) -> None:
        """None is the one model we have."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}", param="model", status=404
            )

    async def check(self, prompts: object, params: SamplingParams | Sequence[SamplingParams]) -> list[Admission]:
        """The core's `check`, on a thread if the text is long."""
        self.core.require_ready()
        items = prompts if isinstance(prompts, list) else [prompts]
        if sum(len(item) for item in items if isinstance(item, str)) < _THREAD_FROM_CHARS:
            return self.core.check(prompts, params)
        return await asyncio.to_thread(self.core.check, prompts, params)

    def start(self, admissions: list[Admission], cache_salt: str | None) -> Run:
        """Admit; what comes of it is in the Run."""
        salt = cache_salt or ""
        if len(salt) > self.core.limits.max_cache_salt_chars:
            raise RequestError(
                f"cache_salt has {len(salt)} characters; the limit is {self.core.limits.max_cache_salt_chars}",
                param="cache_salt",
            )
        stream = DeltaStream(sum(admission.params.n for admission in admissions))
        request = self.core.admit(admissions, sink=stream.put, cache_salt=salt)
        return Run(core=self.core, request=request, stream=stream)


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
