"""One request's tokens and state on a rank: `Sequence`. Imports no torch.

    token_ids     [ prompt ............ | outputs ...... ]
                  0                     num_prompt_tokens
    computed      [ K and V are in block_table | not yet  ]
                  0                            num_computed_tokens

Prefill and decode are one thing here: a step computes some of the tokens not yet computed, and when it has computed the
last one it samples the next. A preempted sequence forgets its blocks, never its tokens.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

from switchgear_runtime.messages import Submit, WireSampling


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """State that scheduler and block manager change; identity, not value, makes two sequences equal."""

    sequence_id: int
    incarnation: int
    token_ids: list[int]  # prompt, then outputs (of earlier lives too)
    num_prompt_tokens: int
    sampling: WireSampling
    tenant: str = ""
    cache_salt: str = ""
    version: int = 0  # of the model; never changes
    status: Literal["waiting", "running", "finished"] = "waiting"
    arrival: int = 0  # rises with each sequence added; the last arrived is preempted first
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache when first admitted
    num_prompt_logprobs: int = 0  # prompt tokens after the first whose logprob was given
    num_preemptions: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))  # whose bytes are an int32 row as it lies
    block_hashes: list[bytes] = field(default_factory=list)  # of the first full blocks of token_ids; grows on demand

    @classmethod
    def from_submit(cls, message: Submit) -> Sequence:
        return cls(
            sequence_id=message.sequence_id,
            incarnation=message.incarnation,
            token_ids=[*message.prompt_token_ids, *message.output_token_ids],
            num_prompt_tokens=len(message.prompt_token_ids),
            sampling=message.sampling,
            tenant=message.tenant,
            cache_salt=message.cache_salt,
            version=message.version,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Also the index of the next output token."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """How many tokens may come from the prefix cache: a position whose logits are wanted must be computed."""
        return self.num_tokens if not self.unscored(0, self.num_tokens) else self.num_prompt_logprobs

    def unscored(self, start: int, end: int) -> range:
        """The positions of [start, end) whose logits give the next token's logprob, asked for and not given yet."""
        if self.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(start, self.num_prompt_logprobs), min(end, self.num_prompt_tokens - 1))

    def num_tokens_max(self, max_model_len: int) -> int:
        """The longest this sequence can get, prompt and outputs."""
        return min(self.num_prompt_tokens + self.sampling.max_tokens, max_model_len)

    def is_full(self, max_model_len: int) -> bool:
        """It ends with its newest token, whatever that is."""
        return self.num_output_tokens >= self.sampling.max_tokens or self.num_tokens >= max_model_len

    def finish_reason(self, max_model_len: int, *, num_tokens: int | None = None) -> Literal["stop", "length"] | None:
        """Why the sequence ends with its newest token, or None when it goes on. `num_tokens`: where that is not the last
        that is there, since one after it is being drawn."""
        sampling = self.sampling
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        num_output_tokens = num_tokens - self.num_prompt_tokens
        if num_output_tokens >= sampling.min_tokens and self.token_ids[num_tokens - 1] in sampling.stop_token_ids:
            return "stop"
        if num_output_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
            return "length"
        return None
