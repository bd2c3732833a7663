"""POST /v1/batch, the native route: one msgpack body with many prompts, one stream of frames with all their tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from switchgear.server.body import read_body
from switchgear.server.delta_stream import TOKENS_PER_READ_MAX
from switchgear.server.frontend import Frontend, Run
from switchgear.server.push_response import PushResponse
from switchgear.server.schema import BatchFrame, BatchRequest, decode_msgpack, encode_frame, sampling_of
from switchgear.server.wire import wire_delta

KEEP_ALIVE_S = 10.0
MEDIA_TYPE = "application/x-switchgear-frames"


class BatchRoute:
    """One instance per server; `post` is the endpoint. A sequence's failure ends that sequence, not the batch."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def post(self, http: Request) -> Response:
        body = decode_msgpack(await read_body(http, self._frontend.core.limits.max_body_bytes), BatchRequest)
        self._frontend.check_model(body.model)
        admissions = await self._frontend.check(body.prompts, sampling_of(body))
        run = self._frontend.start(admissions, body.cache_salt)
        prompts = [admission.prompt_token_ids for admission in admissions] if body.return_prompt_token_ids else []
        return PushResponse(_frames(run, prompts), media_type=MEDIA_TYPE, on_end=run.abort)


async def _frames(run: Run, prompts: list[list[int]]) -> AsyncGenerator[bytes, None]:
    yield encode_frame(BatchFrame(request_id=run.request.request_id))
    for start, end in _spans([len(prompt) for prompt in prompts]):
        yield encode_frame(BatchFrame(prompts=[(i, prompts[i]) for i in range(start, end)]))
    while not run.done:
        yield encode_frame(BatchFrame(deltas=[wire_delta(delta) for delta in await run.read(KEEP_ALIVE_S)]))
    yield encode_frame(BatchFrame(done=True))


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    """[start, end) runs of prompts that fill a frame. Example: lengths 20k, 20k, 1 -> (0, 1), (1, 3)."""
    spans: list[tuple[int, int]] = []
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > TOKENS_PER_READ_MAX:
            spans.append((start, i))
            start, total = i, 0
        total += length
    return [*spans, (start, len(lengths))] if lengths else []
