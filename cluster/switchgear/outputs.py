"""What `generate` and `stream` give back; names are vLLM's. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Logprob:
    """`rank` is 1 for the likeliest token; None for a chosen token that is not among the alternatives asked for."""

    logprob: float
    rank: int | None = None


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One choice of one prompt. `seed` with n=1 gives the same tokens again."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the chosen one and the alternatives, by token id
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    seed: int | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Seconds on the caller's clock, from the call of `generate`."""

    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """One prompt with its choices."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per prompt token, None for the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What `stream` yields: new output of choice `index`. `text` may lag behind the tokens (stop strings, for one)."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    id: str
    created: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """Sums since the server started: tokens routed [layer][expert], rows computed [rank][layer][expert]; routed by
    source rank [rank][layer][expert], by tenant where any is named; `step`: how many, as far as the ranks have told."""

    num_layers: int
    num_experts: int
    generation: int
    epoch: int
    routed: list[list[int]]
    rows: list[list[list[int]]]
    routed_by_source: list[list[list[int]]] = field(default_factory=list)
    routed_by_tenant: dict[str, list[list[int]]] = field(default_factory=dict)
    step: int = 0
    top_k: int = 0


@dataclass(kw_only=True, slots=True)
class ScaleReply:
    """What serves after an order to scale. `num_carried`: sequences that changed their rank for it, or for deaths."""

    ranks: int
    generation: int
    num_carried: int
