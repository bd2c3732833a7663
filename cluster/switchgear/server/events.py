"""What the core tells whoever asked: one `SequenceEvent` per token and one that ends the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from switchgear_runtime.errors import SwitchgearError

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """One token's logprob (the chosen one's, or a prompt's own) and the alternatives, (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """How a sequence ended; each sequence has exactly one. `seed`: send it with n=1 to get these tokens again."""

    reason: FinishReason
    seed: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    stop_reason: str | int | None = None  # the stop string or the stop token id of the request that matched
    error: SwitchgearError | None = None  # set iff reason is "error"


class SequenceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one sequence, choice `index` of prompt `prompt_index`. `text` may lag behind (stop strings).

    Only choice 0 has prompt logprobs, all of them before its first token and before anything of the other choices.
    """

    prompt_index: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None  # one per token id, if asked for
    finish: Finish | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # if asked for: of the next prompt tokens, from the second on


Sink = Callable[[SequenceEvent], None]
