"""What crosses HTTP: sampling fields, and the body and the frames of the native batch route, as msgspec types.

POST /v1/batch takes a msgpack `BatchRequest` and answers with frames: a u32 length (little endian), then that many
bytes of msgpack, a `BatchFrame`. The last frame has `done` or `error`; a stream that ends without one was cut.
"""

from __future__ import annotations

import re
import struct
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from switchgear.server.events import FinishReason, TokenLogprob
from switchgear_runtime.errors import RequestError, WireError
from switchgear_runtime.messages import FRAME_BYTES_MAX
from switchgear_runtime.sampling_params import SamplingParams

FRAME_LENGTH = struct.Struct("<I")
PROMPTS_MAX = 1 << 16  # what can be decoded at all; the configured limit is lower
Body = TypeVar("Body", bound=msgspec.Struct)


class CommonSampling(msgspec.Struct, kw_only=True):
    """SamplingParams as a user may write them; absent fields take its defaults. `logprobs` differs by route."""

    n: int | UnsetType | None = UNSET
    temperature: float | UnsetType | None = UNSET
    top_k: int | UnsetType | None = UNSET
    top_p: float | UnsetType | None = UNSET
    min_p: float | UnsetType | None = UNSET
    presence_penalty: float | UnsetType | None = UNSET
    frequency_penalty: float | UnsetType | None = UNSET
    repetition_penalty: float | UnsetType | None = UNSET
    logit_bias: dict[int, float] | UnsetType | None = UNSET
    stop: str | list[str] | UnsetType | None = UNSET
    stop_token_ids: list[int] | UnsetType | None = UNSET
    include_stop_str_in_output: bool | UnsetType | None = UNSET
    ignore_eos: bool | UnsetType | None = UNSET
    max_tokens: int | UnsetType | None = UNSET
    min_tokens: int | UnsetType | None = UNSET
    prompt_logprobs: int | UnsetType | None = UNSET
    seed: int | UnsetType | None = UNSET

    def sampling(self, **changes: Any) -> SamplingParams:
        """The fields that were given, null being as good as absent, with `changes`."""
        given = {name: getattr(self, name) for name in CommonSampling.__struct_fields__}
        kept = {name: value for name, value in given.items() if value is not UNSET and value is not None}
        return SamplingParams(**kept | changes)


class NativeSampling(CommonSampling, kw_only=True, forbid_unknown_fields=True):
    """In our own route a misspelt field is an error, and max_tokens null means as many as fit."""

    logprobs: int | UnsetType | None = UNSET

    def to_params(self) -> SamplingParams:
        changes: dict[str, Any] = {} if isinstance(self.logprobs, UnsetType) else {"logprobs": self.logprobs}
        if self.max_tokens is None:
            changes["max_tokens"] = None
        return self.sampling(**changes)


class ChatFields(msgspec.Struct, kw_only=True):
    """How a conversation becomes a prompt; names and defaults are vLLM's."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Conversations(ChatFields, kw_only=True, forbid_unknown_fields=True):
    """Messages instead of prompts, for each its list of {"role", "content"}."""

    messages: Annotated[list[list[dict[str, Any]]], msgspec.Meta(max_length=PROMPTS_MAX)]


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/batch. `sampling`: one for all prompts, or one each. `prompts` or `conversations`."""

    prompts: Annotated[list[str | list[int]], msgspec.Meta(max_length=PROMPTS_MAX)] | None = None
    conversations: Conversations | None = None
    sampling: NativeSampling | Annotated[list[NativeSampling], msgspec.Meta(max_length=PROMPTS_MAX)] = msgspec.field(
        default_factory=NativeSampling
    )
    model: str | None = None
    cache_salt: str = ""
    return_prompt_token_ids: bool = True


class WireFinish(msgspec.Struct, array_like=True, frozen=True):
    reason: FinishReason
    stop_reason: str | int | None
    seed: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    error: str | None = None
    error_status: int | None = None


class WireDelta(msgspec.Struct, array_like=True, frozen=True):
    """New output of choice `index` of prompt `prompt_index`."""

    prompt_index: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish: WireFinish | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class BatchFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Many sequences' news. An empty frame says that the server lives."""

    request_id: str | None = None  # in the first frame
    prompts: list[tuple[int, list[int]]] = []  # (prompt index, its token ids), in the first frames
    deltas: list[WireDelta] = []
    done: bool = False
    error: dict[str, Any] | None = None  # as in an error response; ends the stream


def decode_msgpack(body: bytes, kind: type[Body]) -> Body:
    """Typed decoding: what the schema does not want (extension types, deep nesting) is never built."""
    if len(body) > FRAME_BYTES_MAX:
        raise RequestError(f"the body has {len(body)} bytes; a msgpack body may have {FRAME_BYTES_MAX}", status=413)
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise schema_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid msgpack: {error}") from None


def sampling_of(request: BatchRequest) -> SamplingParams | list[SamplingParams]:
    if isinstance(request.sampling, NativeSampling):
        return request.sampling.to_params()
    return [one.to_params() for one in request.sampling]


def encode_frame(frame: BatchFrame) -> bytes:
    data = msgspec.msgpack.encode(frame)
    if len(data) > FRAME_BYTES_MAX:
        raise WireError(f"a batch frame takes {len(data)} bytes; the limit is {FRAME_BYTES_MAX}")
    return FRAME_LENGTH.pack(len(data)) + data


class FrameReader:
    """Frames out of a byte stream: `feed` chunks as they come. Raises WireError on a broken frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[BatchFrame]:
        self._buffer += chunk
        frames: list[BatchFrame] = []
        while len(self._buffer) >= FRAME_LENGTH.size:
            (length,) = FRAME_LENGTH.unpack_from(self._buffer)
            if length > FRAME_BYTES_MAX:
                raise WireError(f"a batch frame of {length} bytes is over the limit of {FRAME_BYTES_MAX}")
            end = FRAME_LENGTH.size + length
            if len(self._buffer) < end:
                break
            data = bytes(self._buffer[FRAME_LENGTH.size : end])
            del self._buffer[:end]
            try:
                frames.append(msgspec.msgpack.decode(data, type=BatchFrame))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise WireError(f"a batch frame breaks the schema: {error}") from None
        return frames


def schema_error(error: msgspec.ValidationError) -> RequestError:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" with the field in front and as `param`."""
    message = str(error).replace("`", "").replace(" | unset", "")
    found = re.search(r" - at (?:\w+ in )?\$\.([\w.\[\]]+)$", message)
    if found is None:
        return RequestError(f"the body breaks the schema: {message}")
    field = found.group(1)
    return RequestError(f"{field}: {message[: found.start()]}", param=re.split(r"[.\[]", field)[0])
