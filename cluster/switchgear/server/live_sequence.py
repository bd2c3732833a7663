"""The server's side of one sequence, from admission to its one finish: `LiveSequence`.

It keeps every token emitted, because they are what another rank needs to go on with the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from switchgear.server.admission import Admission
from switchgear.server.detokenizer import Detokenizer
from switchgear.server.events import Finish, FinishReason, TokenLogprob
from switchgear.server.stop_strings import StopStrings
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import SwitchgearError
from switchgear_runtime.messages import PromptLogprobs, Submit, TokenOutput, WireSampling

if TYPE_CHECKING:
    from switchgear.server.request import Request

# Of ranks that held a sequence, in a row without a token of it. From the first number on it is a suspect, and runs where
# no other suspect does; at the second it ends.
DEATHS_OF_A_SUSPECT, DEATHS_MAX = 2, 4


@dataclass(kw_only=True, slots=True, eq=False)
class LiveSequence:
    """`take` turns the next token into text and, at the end, a finish reason."""

    sequence_id: int
    request: Request
    prompt_index: int
    index: int  # choice
    prompt_token_ids: list[int]
    sampling: WireSampling
    stop_token_ids: frozenset[int]  # the request's own, without end-of-sequence
    include_stop: bool
    detokenizer: Detokenizer
    stops: StopStrings
    tenant: str
    cache_salt: str
    version: int = 0  # of the model, to the end
    rank: int | None = None  # while it waits for one
    incarnation: int = 0  # how often it was sent to a rank
    num_unanswered_bytes: int = 0  # of its last Submit, until the first token
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None  # grows from the second prompt token on, if asked for
    followers: list[LiveSequence] = field(default_factory=list)  # other choices, to start after its first token
    num_deaths: int = 0  # of ranks that held it, since its last token
    num_cached_tokens: int = 0
    last_token_s: float | None = None

    @classmethod
    def of(
        cls,
        admission: Admission,
        sampling: WireSampling,
        *,
        sequence_id: int,
        request: Request,
        prompt_index: int,
        index: int,
        tokenizer: Tokenizer | None,
        tenant: str,
        cache_salt: str,
        version: int,
    ) -> LiveSequence:
        """One choice of an admitted prompt."""
        params = admission.params
        return cls(
            sequence_id=sequence_id,
            request=request,
            prompt_index=prompt_index,
            index=index,
            prompt_token_ids=admission.prompt_token_ids,
            sampling=sampling,
            stop_token_ids=frozenset(params.stop_token_ids),
            include_stop=params.include_stop_str_in_output,
            detokenizer=Detokenizer(tokenizer, admission.prompt_token_ids),
            stops=StopStrings(params.stop, include_in_output=params.include_stop_str_in_output),
            tenant=tenant,
            cache_salt=cache_salt,
            version=version,
        )

    def submit(self) -> Submit:
        """What a rank needs to start this sequence, or to go on with it."""
        sampling = self.sampling
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) == len(self.prompt_token_ids) - 1:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)  # the rank before gave them all
        return Submit(
            sequence_id=self.sequence_id,
            incarnation=self.incarnation,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=list(self.output_token_ids),
            sampling=sampling,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
            version=self.version,
        )

    @property
    def is_suspect(self) -> bool:
        """Of killing ranks."""
        return self.num_deaths >= DEATHS_OF_A_SUSPECT

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_submit_bytes(self) -> int:
        """About what `submit` takes on the wire."""
        return 5 * self.num_tokens + 14 * len(self.sampling.logit_bias) + 4 * len(self.cache_salt) + 512

    def accepts(self, rank: int, token: TokenOutput) -> bool:
        """Only the next token of the current owner; a rank declared dead may still have something in flight."""
        return rank == self.rank and token.incarnation == self.incarnation and token.index == len(self.output_token_ids)

    def take_prompt_logprobs(self, part: PromptLogprobs) -> None:
        """Keep what is new; a prompt that is computed again gives the same again."""
        if self.prompt_logprobs is None:
            self.prompt_logprobs = []
        num_known = len(self.prompt_logprobs)
        assert part.start <= num_known + 1, (part.start, num_known)
        for i in range(num_known + 1 - part.start, len(part.logprobs)):
            token_id = self.prompt_token_ids[part.start + i]
            one = TokenLogprob(token_id=token_id, logprob=part.logprobs[i], top=part.top_logprobs[i])
            self.prompt_logprobs.append(one)

    def take(self, token: TokenOutput) -> tuple[str, FinishReason | None, str | int | None]:
        """(text to emit, finish reason, stop reason) of an accepted token."""
        self.output_token_ids.append(token.token_id)
        if token.num_cached_tokens is not None:
            self.num_cached_tokens = token.num_cached_tokens
        stopped_by_token = token.finish_reason == "stop"
        text = self.detokenizer.append(token.token_id) if self.include_stop or not stopped_by_token else ""
        may_stop = len(self.output_token_ids) > self.sampling.min_tokens
        text = self.stops.push(text, may_stop=may_stop)
        if token.finish_reason is not None and self.stops.matched is None:
            text += self.stops.push(self.detokenizer.flush(), may_stop=may_stop)
        if self.stops.matched is not None:
            return text, "stop", self.stops.matched
        if token.finish_reason is None:
            return text, None, None
        text += self.stops.flush()
        if stopped_by_token:
            return text, "stop", token.token_id if token.token_id in self.stop_token_ids else None
        return text, "length", None

    def finish(self, reason: FinishReason, stop_reason: str | int | None, error: SwitchgearError | None) -> Finish:
        """What its caller is told at the end."""
        return Finish(
            reason=reason,
            seed=self.sampling.seed,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_output_tokens=len(self.output_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            stop_reason=stop_reason,
            error=error,
        )


def token_logprob(token: TokenOutput) -> TokenLogprob | None:
    if token.logprob is None:
        return None
    return TokenLogprob(token_id=token.token_id, logprob=token.logprob, top=list(token.top_logprobs or ()))
