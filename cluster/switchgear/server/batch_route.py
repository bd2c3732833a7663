"""POST /v1/batch, the native route: one msgpack body with many prompts, one stream of frames with all their tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from switchgear.server.containers import check_msgpack
from switchgear.server.delta_stream import TOKENS_PER_READ_MAX
from switchgear.server.errors import body_of
from switchgear.server.frontend import Frontend, Run
from switchgear.server.push_response import PushResponse
from switchgear.server.schema import BatchFrame, BatchRequest, decode_msgpack, encode_frame, sampling_of
from switchgear.server.wire import wire_delta
from switchgear_runtime.errors import RequestError, SwitchgearError

KEEP_ALIVE_S = 10.0
MEDIA_TYPE = "application/x-switchgear-frames"


class BatchRoute:
    """One instance per server; `post` is the endpoint. A sequence's failure ends that sequence, not the batch."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def post(self, http: Request) -> Response:
        data = await self._frontend.read(http)
        if b"conversations" in data:  # all else has a type without containers inside
            await check_msgpack(data)
        body = decode_msgpack(data, BatchRequest)
        self._frontend.check_model(body.model)
        self._frontend.check_salt(body.cache_salt)
        prompts, add_special = await self._prompts(body)
        admissions = await self._frontend.check(prompts, sampling_of(body), add_special=add_special)
        run = self._frontend.start(admissions, body.cache_salt)
        token_ids = [admission.prompt_token_ids for admission in admissions] if body.return_prompt_token_ids else []
        return PushResponse(_frames(run, token_ids), media_type=MEDIA_TYPE, on_end=run.abort)

    async def _prompts(self, body: BatchRequest) -> tuple[Sequence[str | list[int]], bool]:
        """The prompts, and whether texts among them are plain (a chat template puts special tokens in itself)."""
        if (body.prompts is None) == (body.conversations is None):
            raise RequestError("give either prompts or conversations", param="prompts")
        param = "prompt" if body.prompts is not None else "conversations"
        items = body.prompts if body.prompts is not None else body.conversations.messages  # type: ignore[union-attr]
        num_params = len(body.sampling) if isinstance(body.sampling, list) else None
        self._frontend.core.admitter.check_counts(len(items), num_params, param=param)
        if body.prompts is not None:
            return body.prompts, True
        assert body.conversations is not None
        return [await self._frontend.chat_prompt(one, body.conversations) for one in body.conversations.messages], False


async def _frames(run: Run, prompts: list[list[int]]) -> AsyncGenerator[bytes, None]:
    yield encode_frame(BatchFrame(request_id=run.request.request_id))
    for start, end in _spans([len(prompt) for prompt in prompts]):
        yield encode_frame(BatchFrame(prompts=[(i, prompts[i]) for i in range(start, end)]))
    try:
        while not run.done:
            yield encode_frame(BatchFrame(deltas=[wire_delta(delta) for delta in await run.read(KEEP_ALIVE_S)]))
    except SwitchgearError as error:
        yield encode_frame(BatchFrame(error=body_of(error)))
        return
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
