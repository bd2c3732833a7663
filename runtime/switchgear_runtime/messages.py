"""What server and rank say to each other, and how it is written: one msgpack frame a message, never pickle.

Server -> rank: BeginGeneration, EndGeneration, StageMap, DropMap, Submit, Abort, Wake, Stop, StoreValue.
Rank -> server: Hello, StepFrame, MapStaged, MapRefused, Waking, Parked, Fault, Rejected, Stopped, StorePut, StoreGet.
`encode`/`decode` are total: a frame that breaks a limit or the schema raises WireError and names the field.
"""

from __future__ import annotations

from typing import Any, Literal

import msgpack
import msgspec

from switchgear_runtime.errors import WireError
from switchgear_runtime.generation import GenerationDescriptor

FRAME_BYTES_MAX = 16 << 20
ITEMS_MAX = 1 << 20  # longest array or map: prompts and expert-load rows

# --- server -> rank -----------------------------------------------------------------------------------------------


class BeginGeneration(msgspec.Struct, tag="begin_generation", frozen=True):
    """`expert_map`: ExpertMap.to_json of the map to compute with, the same for all ranks and of the descriptor's epoch;
    None: the contiguous one. `versions`: ModelVersions.to_json; None: the checkpoint is the only one."""

    descriptor: GenerationDescriptor
    expert_map: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None


class EndGeneration(msgspec.Struct, tag="end_generation", frozen=True):
    """The controller gives this generation up (a rank is dead): abort its transport and wait for the next."""

    term: int
    generation: int
    reason: str


class StageMap(msgspec.Struct, tag="stage_map", frozen=True, kw_only=True):
    """Bring this map's experts here while steps go on; answered by MapStaged or MapRefused, once.

    All ranks flip to it at one step boundary once all have staged it, with no further word (StepFrame.epoch tells).
    `expert_map`: ExpertMap.to_json, of an epoch later than any that this generation has heard of; once staged, it takes
    the place of an earlier one that waits for its flip. `bytes_per_s`: bounds what this rank
    reads or copies for it; None: unbounded. `source`: where the experts come from that this rank has no packed copy of:
    another rank that computes with them ("peer"), or the checkpoint; "auto": what costs least. `versions`:
    ModelVersions.to_json, in force from the flip on; None: those in force stay.
    """

    generation: int
    expert_map: dict[str, Any]
    versions: dict[str, Any] | None = None
    bytes_per_s: int | None = None
    source: Literal["auto", "peer", "checkpoint"] = "auto"


class DropMap(msgspec.Struct, tag="drop_map", frozen=True):
    """Forget a staged map, or stop staging it; too late for one that is in use. Not answered.

    Sent to all ranks, so one may have dropped it in a step in which another still offers it: then nobody flips.
    """

    generation: int
    epoch: int


class WireSampling(msgspec.Struct, frozen=True, kw_only=True):
    """SamplingParams as a rank needs them: stop strings stay with the server, n is expanded, limits are resolved."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    stop_token_ids: tuple[int, ...]  # end-of-sequence ids included unless ignore_eos
    max_tokens: int
    min_tokens: int
    logprobs: int | None
    seed: int  # 64 bits, unsigned
    prompt_logprobs: int | None = None  # alternatives beside each prompt token; None: the prompt is not scored


class Submit(msgspec.Struct, tag="submit", frozen=True, kw_only=True):
    """A sequence for this rank. `output_token_ids`: emitted before (by another rank, another life); the next index follows
    them. `version`: of the model (ModelVersions), for all its life; a rank that does not know it answers Rejected."""

    sequence_id: int
    incarnation: int  # rises each time the server hands the sequence to a rank; comes back in every token
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling: WireSampling
    tenant: str = ""
    cache_salt: str = ""
    version: int = 0


class Submits(msgspec.Struct, tag="submits", frozen=True):
    """Sequences that come together: a parked rank that took the first one alone would run a step without the rest."""

    sequences: list[Submit]


class Abort(msgspec.Struct, tag="abort", frozen=True):
    sequence_id: int


class Wake(msgspec.Struct, tag="wake", frozen=True):
    """Leave the park of `step` in `generation`; ignored by a rank that already did."""

    generation: int
    step: int


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the process once all ranks agree in their headers. The server has drained before."""


class StoreValue(msgspec.Struct, tag="store_value", frozen=True):
    """What a StoreGet asked for, once it is there: one message a key."""

    channel: str
    key: str
    value: bytes


ToRank = BeginGeneration | EndGeneration | StageMap | DropMap | Submit | Submits | Abort | Wake | Stop | StoreValue

# --- rank -> server -----------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """The rank has its weights and waits for a generation."""

    rank: int
    pid: int
    fingerprint: str  # numeric fingerprint: ranks that differ may not join one generation
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    num_layers: int  # MoE layers
    num_experts: int  # logical
    host: str = ""  # where it runs: ranks that share it share memory
    domain: str = ""  # ranks that share it have fast links between their devices; empty: those of its host


class TokenOutput(msgspec.Struct, array_like=True, frozen=True):
    """One new token of one sequence. `top_logprobs`: (token id, logprob), best first, ties to the lowest id."""

    sequence_id: int
    incarnation: int
    index: int  # 0 is the first output token
    token_id: int
    finish_reason: str | None = None  # "stop" (a stop token id) or "length"
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    num_cached_tokens: int | None = None  # on index 0: prompt tokens found in the prefix cache


class PromptLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Logprobs of prompt tokens start, start + 1, ... of one sequence, each given all before it (token 0 has none).

    A step sends those it computed, in order and before the sequence's first token. `top_logprobs`: as TokenOutput's.
    """

    sequence_id: int
    incarnation: int
    start: int
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]


class RankStats(msgspec.Struct, array_like=True, frozen=True):
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    num_preemptions: int  # since start
    num_computed_tokens: int  # since start
    prefix_cache_hit_tokens: int  # since start
    prefix_cache_query_tokens: int  # since start


class StepFrame(msgspec.Struct, tag="step", frozen=True, kw_only=True):
    """Everything a step produced on this rank, in one frame.

    `expert_load`, at most about once a second: tokens since the last report, flattened [num_layers * num_experts],
    counted at the router of this (source) rank. `expert_rows`: likewise, rows computed by this rank's own experts.
    `step`, `epoch`: of the turn in which the frame was sent and of its map; the step of a flip sends a frame even if it has
    nothing to say. Where steps are finished a turn later (devices), the tokens are of the step before.
    `tenant_load`: `expert_load` by tenant, as ExpertLoad.taken_by_tenant gives it.
    """

    rank: int
    generation: int
    step: int
    tokens: list[TokenOutput]
    stats: RankStats
    expert_load: list[int] | None = None
    expert_rows: list[int] | None = None
    prompt_logprobs: list[PromptLogprobs] = []
    epoch: int = 0
    tenant_load: dict[str, bytes] = {}


class MapStaged(msgspec.Struct, tag="map_staged", frozen=True, kw_only=True):
    """This rank has all experts of the map and offers to flip to it. `sources`: how many of the new ones came out of
    another rank's memory ("mapped"), over a connection to it ("peer"), or from weight cache, checkpoint or file ("disk")."""

    rank: int
    generation: int
    epoch: int
    num_experts: int  # (layer, expert) pairs that this rank did not compute with before
    moved_bytes: int  # of their packed weights
    seconds: float  # from StageMap to here
    sources: dict[str, int] = {}


class MapRefused(msgspec.Struct, tag="map_refused", frozen=True, kw_only=True):
    """This rank will not flip to the map: it is malformed or too large, its source failed, or its time has passed."""

    rank: int
    generation: int
    epoch: int
    reason: str


class Waking(msgspec.Struct, tag="waking", frozen=True):
    """This parked rank found work; the server passes Wake(generation, step) on to the others."""

    rank: int
    generation: int
    step: int


class Parked(msgspec.Struct, tag="parked", frozen=True):
    rank: int
    generation: int
    step: int


class Fault(msgspec.Struct, tag="fault", frozen=True, kw_only=True):
    """The step broke; this rank gave the generation up. `peers`: whom it blames."""

    rank: int
    generation: int
    step: int
    kind: str
    peers: list[int]
    message: str


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """The rank cannot run this sequence (it would never fit, say)."""

    sequence_id: int
    incarnation: int
    message: str


class Stopped(msgspec.Struct, tag="stopped", frozen=True):
    rank: int


class StorePut(msgspec.Struct, tag="store_put", frozen=True):
    """Leave a value for the other ranks of a generation: how a network transport's ranks meet."""

    channel: str
    key: str
    value: bytes


class StoreGet(msgspec.Struct, tag="store_get", frozen=True):
    channel: str
    keys: list[str]


FromRank = (
    Hello | StepFrame | MapStaged | MapRefused | Waking | Parked | Fault | Rejected | Stopped | StorePut | StoreGet
)


def encode(message: ToRank | FromRank) -> bytes:
    data: bytes = msgpack.packb(msgspec.to_builtins(message), use_bin_type=True)
    if len(data) > FRAME_BYTES_MAX:
        raise WireError(f"{type(message).__name__} takes {len(data)} bytes; a frame holds at most {FRAME_BYTES_MAX}")
    return data


def _refuse_ext(code: int, _data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} is not part of the protocol")


def unpack(data: bytes) -> Any:
    """msgpack -> plain objects, every limit set, extension types refused."""
    if len(data) > FRAME_BYTES_MAX:
        raise WireError(f"a frame of {len(data)} bytes is over the limit of {FRAME_BYTES_MAX}")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            max_str_len=FRAME_BYTES_MAX,
            max_bin_len=FRAME_BYTES_MAX,
            max_array_len=ITEMS_MAX,
            max_map_len=ITEMS_MAX,
            max_ext_len=0,
            ext_hook=_refuse_ext,
        )
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:  # TypeError: a map as a key
        raise WireError(f"not a valid msgpack frame: {error}") from None


def decode_to_rank(data: bytes) -> ToRank:
    try:
        message: ToRank = msgspec.convert(unpack(data), type=ToRank)
        return message
    except msgspec.ValidationError as error:
        raise WireError(f"frame breaks the schema: {error}") from None


def decode_from_rank(data: bytes) -> FromRank:
    try:
        message: FromRank = msgspec.convert(unpack(data), type=FromRank)
        return message
    except msgspec.ValidationError as error:
        raise WireError(f"frame breaks the schema: {error}") from None
