"""One call of POST /v1/batch without its IO: `BatchCall`, shared by Client and AsyncClient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from switchgear.assembler import Assembler
from switchgear.client_errors import ServerError, ServerUnreachable, error_of
from switchgear.outputs import RequestOutput
from switchgear.prompts import Message, Prompt
from switchgear.server.schema import FrameReader, WireDelta
from switchgear_runtime.errors import WireError
from switchgear_runtime.sampling_params import SamplingParams

PROMPTS_PER_CALL = 1024  # the server's default limit; longer lists go in several calls
_DEFAULTS = asdict(SamplingParams())


class BatchCall:
    """Post `body`, `feed` the answer's chunks, then take `outputs`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        conversations: Mapping[str, Any] | None = None,
    ) -> None:
        """`conversations` (see schema.Conversations): instead of the prompts, which then only count."""
        same = all(one is params[0] for one in params)
        what = {"prompts": list(prompts)} if conversations is None else {"conversations": conversations}
        self.body = msgspec.msgpack.encode(
            {**what, "sampling": _fields(params[0]) if same else [_fields(one) for one in params]}
        )
        self.assembler = Assembler(prompts, params)
        self._reader = FrameReader()
        self._done = False

    @classmethod
    def of_conversations(
        cls, messages: Sequence[Sequence[Message]], params: Sequence[SamplingParams], options: Mapping[str, Any]
    ) -> BatchCall:
        given = {name: value for name, value in options.items() if value is not None}
        return cls([[] for _ in messages], params, {"messages": [list(one) for one in messages], **given})

    def feed(self, chunk: bytes) -> list[WireDelta]:
        """The deltas of a chunk, already added to the outputs."""
        try:
            frames = self._reader.feed(chunk)
        except WireError as error:
            raise ServerError(f"the server's answer is not its protocol: {error}") from None
        deltas: list[WireDelta] = []
        for frame in frames:
            if frame.error is not None:
                raise error_of(frame.error, 500)
            if frame.request_id is not None:
                self.assembler.accepted(frame.request_id)
            for index, token_ids in frame.prompts:
                self.assembler.outputs[index].prompt_token_ids = token_ids
            for delta in frame.deltas:
                self.assembler.add(delta)
            deltas += frame.deltas
            self._done = self._done or frame.done
        return deltas

    def outputs(self) -> list[RequestOutput]:
        """All of them, once the answer has ended. Raises if it was cut, or if a sequence failed."""
        if not self._done:
            raise ServerUnreachable("the connection ended before the answer did")
        if self.assembler.error is not None:
            raise self.assembler.error
        return self.assembler.outputs


def parts(num_prompts: int) -> list[slice]:
    """The calls that many prompts take."""
    return [slice(i, i + PROMPTS_PER_CALL) for i in range(0, num_prompts, PROMPTS_PER_CALL)]


def _fields(params: SamplingParams) -> dict[str, Any]:
    """Only what differs from the defaults."""
    return {name: value for name, value in asdict(params).items() if value != _DEFAULTS[name]}
