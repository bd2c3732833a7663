"""The server's mind: `ServerCore` admits requests, hands sequences to ranks, and turns tokens into events.

Sans-IO and single-threaded: it is called on one asyncio loop (or by the simulation), talks to ranks through `send`, to
its callers through their sinks, and to the clock through `System`. Each accepted sequence ends exactly once. A rank
that dies or leaves ends none: the core has every token it gave, and another rank goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from switchgear.outputs import ExpertLoad
from switchgear.server.admission import Admission, Admitter, Prompt, parse_prompts
from switchgear.server.events import Finish, FinishReason, SequenceEvent, Sink, TokenLogprob
from switchgear.server.limits import ModelFacts, ServerLimits
from switchgear.server.live_sequence import DEATHS_MAX, LiveSequence, token_logprob
from switchgear.server.load_table import LoadTable
from switchgear.server.rank_table import RankTable
from switchgear.server.request import Observer, Request
from switchgear.server.seeds import draw_seed
from switchgear.server.waiting_line import WaitingLine
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.errors import RankFailed, RequestError, SwitchgearError
from switchgear_runtime.messages import (
    Abort,
    FromRank,
    Hello,
    Parked,
    Rejected,
    StepFrame,
    TokenOutput,
    ToRank,
    WireSampling,
)
from switchgear_runtime.sampling_params import SamplingParams
from switchgear_runtime.system import System


class ServerCore:
    """All live requests. `submit` and `abort` are for callers; `on_message`, `set_ready`, `lose_rank`, `vacate` and
    `fail_all` for the cluster."""

    def __init__(
        self,
        *,
        system: System,
        tokenizer: Tokenizer | None,
        facts: ModelFacts,
        send: Callable[[int, ToRank], None],
        limits: ServerLimits | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self.limits = limits or ServerLimits()
        self.observer = observer
        self.max_model_len = facts.max_model_len  # a rank whose KV cache is smaller lowers it
        self.ranks = RankTable(facts)
        self.load = LoadTable(facts)
        self.generation = 0
        self.epoch = 0
        self.model_version = 0  # of new sequences; each keeps the one it began with
        self.draining = False
        self.num_discarded_tokens = 0  # late ones, of sequences that ended or moved
        self.num_carried = 0  # sequences that went on with another rank than they were on
        self._system = system
        self._send = send
        self.admitter = Admitter(tokenizer, facts, self.limits)
        self._requests: dict[str, Request] = {}
        self._sequences: dict[int, LiveSequence] = {}
        self.waiting = WaitingLine(self.ranks)
        self._num_submitted = 0
        self._fingerprint: str | None = None

    # --- callers ------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return not self.draining and self.ranks.num_serving > 0

    @property
    def num_live(self) -> int:
        return len(self._sequences)

    @property
    def oldest_version(self) -> int:
        """Of the model, that a sequence needs."""
        return min((one.version for one in self._sequences.values()), default=self.model_version)

    @property
    def system_fingerprint(self) -> str | None:
        """OpenAI's word for what a seed's tokens depend on beside the request: the ranks' numeric fingerprint, and the
        model version of a request that comes now."""
        known = self._fingerprint is not None and self.model_version > 0
        return f"{self._fingerprint}_v{self.model_version}" if known else self._fingerprint

    def check(
        self, prompts: object, params: SamplingParams | Sequence[SamplingParams], *, add_special: bool = True
    ) -> list[Admission]:
        """Validate and tokenize; RequestError if refused. Changes nothing and may run on another thread.

        `add_special`: whether texts get the tokenizer's own special tokens; a chat template has put them in already.
        """
        parsed: list[Prompt] = parse_prompts(prompts, self.limits.max_prompts_per_request)
        return self.admitter.check(parsed, params, self.max_model_len, add_special=add_special)

    def admit(self, admissions: Sequence[Admission], *, sink: Sink, tenant: str = "", cache_salt: str = "") -> Request:
        """Start what `check` passed, all or nothing: RequestError 503 while not ready, 429 when the queue is full."""
        self.require_ready()
        num_sequences = sum(admission.params.n for admission in admissions)
        if self.num_live + num_sequences > self.limits.max_queued:
            raise RequestError(
                f"the queue is full: {self.num_live} sequences of at most {self.limits.max_queued} are unfinished and "
                f"this request asks for {num_sequences} more; retry later",
                status=429,
            )
        request = Request(
            request_id=f"{self._system.randbits(96):024x}",
            sink=sink,
            arrival_s=self._system.now(),
            admissions=list(admissions),
        )
        self._requests[request.request_id] = request
        bases: dict[int, WireSampling] = {}  # by SamplingParams, which prompts may share
        for prompt_index, admission in enumerate(admissions):
            seed = admission.params.seed if admission.params.seed is not None else draw_seed(self._system)
            if self.observer:
                self.observer.accepted(len(admission.prompt_token_ids))
            base = bases.get(id(admission.params)) or self.admitter.wire_sampling(admission, seed)
            bases[id(admission.params)] = base
            sequences = [
                self._make(request, prompt_index, index, admission, sampling, tenant, cache_salt)
                for index, sampling in enumerate(self.admitter.choices(admission, base, seed))
            ]
            for sequence in self._leaders(admission, sequences):
                self.waiting.add(sequence)
        self._feed()
        return request

    def submit(
        self,
        prompts: object,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        sink: Sink,
        tenant: str = "",
        cache_salt: str = "",
    ) -> Request:
        """`check` and `admit`. `prompts`: str | list[str] | list[int] | list[list[int]]."""
        self.require_ready()
        return self.admit(self.check(prompts, params), sink=sink, tenant=tenant, cache_salt=cache_salt)

    def expert_load(self) -> ExpertLoad:
        """Sums since the start."""
        return self.load.sums(generation=self.generation, epoch=self.epoch)

    def abort(self, request_id: str) -> None:
        """End what is left of a request, on its ranks too. Idempotent."""
        self._abort(request_id)
        self._feed()

    def require_ready(self) -> None:
        if self.draining:
            raise RequestError("the server is shutting down; retry elsewhere", status=503)
        if not self.ready:
            raise RequestError("the ranks are not ready; retry in a moment", status=503)

    # --- the cluster --------------------------------------------------------------------------------------------

    def set_ready(
        self, ranks: Iterable[int] | None, *, generation: int | None = None, epoch: int | None = None
    ) -> None:
        """Which ranks take new sequences from now on; None: no generation is whole."""
        self.ranks.serve(ranks or ())
        self.generation = self.generation if generation is None else generation
        self.epoch = self.epoch if epoch is None else epoch
        self._feed()

    def on_message(self, rank: int, message: FromRank) -> None:
        """Everything a rank says may come here; what is the controller's alone is ignored."""
        if isinstance(message, StepFrame):
            self.ranks.step(message)
            self.load.step(message)
            for part in message.prompt_logprobs:
                scored = self._sequences.get(part.sequence_id)
                if scored is not None and (scored.rank, scored.incarnation) == (rank, part.incarnation):
                    scored.take_prompt_logprobs(part)
            for token in message.tokens:
                self._take(rank, token)
        elif isinstance(message, Hello):
            self.ranks.hello(message)
            self._fingerprint = f"fp_{blake2b(message.fingerprint.encode(), digest_size=5).hexdigest()}"
            self.max_model_len = min(self.max_model_len, message.max_model_len)
        elif isinstance(message, Rejected):
            sequence = self._sequences.get(message.sequence_id)
            if sequence is not None and (sequence.rank, sequence.incarnation) == (rank, message.incarnation):
                self._release(sequence)  # each is refused for itself
                self._finish(sequence, "error", error=RequestError(message.message, param="prompt"))
        elif isinstance(message, Parked):
            self.ranks.park(rank)
        self._feed()

    def lose_rank(self, rank: int, reason: str) -> None:
        """A rank is dead: what it held goes on elsewhere, from prompt and emitted tokens, once ranks serve again.

        A sequence that ranks die under again and again, with no token in between, is taken to be what kills them.
        """
        self.ranks.lose(rank)
        for sequence in self._held_by({rank}):
            sequence.num_deaths += 1
        for suspect in [one for one in self._held_by({rank}) if one.num_deaths >= DEATHS_MAX]:
            error = RankFailed(f"{reason}; no rank has survived this sequence, of {suspect.num_deaths} that held it")
            for sequence in (suspect, *suspect.followers):
                self._finish(sequence, "error", error=error)
        self._carry({rank})

    def vacate(self, ranks: Iterable[int]) -> None:
        """These ranks are about to leave: they get no more sequences, and what they hold goes on elsewhere."""
        leaving = set(ranks)
        self.ranks.serve({state.rank for state in self.ranks.states() if state.serving} - leaving)
        for sequence in self._held_by(leaving):
            assert sequence.rank is not None
            self._send(sequence.rank, Abort(sequence.sequence_id))
        self._carry(leaving)
        self._feed()

    def fail_all(self, reason: str) -> None:
        """No rank can go on: every sequence ends with an error."""
        for sequence in list(self._sequences.values()):
            self._finish(sequence, "error", error=RankFailed(reason))

    def abort_all(self) -> None:
        """The end of a drain whose deadline passed."""
        for request_id in list(self._requests):
            self._abort(request_id)

    # --- from rank to rank --------------------------------------------------------------------------------------

    def _held_by(self, ranks: set[int]) -> list[LiveSequence]:
        """What these ranks were sent and have not finished."""
        return [one for one in self._sequences.values() if one.rank in ranks and one.incarnation > 0]

    def _carry(self, ranks: set[int]) -> None:
        """Back to the line, ahead of who came later; choices that wait for their first one come along."""
        carried = self._held_by(ranks)
        for sequence in carried:
            for one in (sequence, *sequence.followers):
                self._give_up_place(one)
                one.rank = None
        self.waiting.put_back(carried)
        self.num_carried += len(carried)

    def _give_up_place(self, sequence: LiveSequence) -> None:
        assert sequence.rank is not None
        self._answered(sequence)
        self.ranks.remove(sequence.rank, sequence.num_tokens)

    # --- one sequence -------------------------------------------------------------------------------------------

    def _leaders(self, admission: Admission, choices: list[LiveSequence]) -> list[LiveSequence]:
        """Those of one prompt's choices that may start when they get a rank; the others follow the first.

        Where a prompt fills a KV block, the first choice computes it and the others wait for that, on the same rank, to
        find it in the prefix cache. They also wait for prompt logprobs, which only the first one gives.
        """
        shared = self.facts.prefix_caching and len(admission.prompt_token_ids) > self.ranks.block_size
        if not shared and admission.params.prompt_logprobs is None:
            return choices
        choices[0].followers = choices[1:]
        return choices[:1]

    def _make(
        self,
        request: Request,
        prompt_index: int,
        index: int,
        admission: Admission,
        sampling: WireSampling,
        tenant: str,
        cache_salt: str,
    ) -> LiveSequence:
        sequence = LiveSequence.of(
            admission,
            sampling,
            sequence_id=self._num_submitted,
            request=request,
            prompt_index=prompt_index,
            index=index,
            tokenizer=self.tokenizer,
            tenant=tenant,
            cache_salt=cache_salt,
            version=self.model_version,
        )
        self._num_submitted += 1
        self._sequences[sequence.sequence_id] = sequence
        request.sequences[sequence.sequence_id] = sequence
        return sequence

    def _feed(self) -> None:
        """Hand waiting sequences to ranks that have room."""
        for sequence in self.waiting.feed():
            self._start(sequence)

    def _start(self, sequence: LiveSequence) -> None:
        """Send it to the rank it has a place on."""
        assert sequence.rank is not None
        sequence.incarnation += 1
        sequence.num_unanswered_bytes = sequence.num_submit_bytes
        self.ranks[sequence.rank].num_unanswered_bytes += sequence.num_unanswered_bytes
        self._send(sequence.rank, sequence.submit())

    def _answered(self, sequence: LiveSequence) -> None:
        assert sequence.rank is not None
        self.ranks.answered(sequence.rank, sequence.sequence_id, sequence.num_unanswered_bytes)
        sequence.num_unanswered_bytes = 0

    def _abort(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        for sequence in list(request.sequences.values()) if request else ():
            if sequence.rank is not None and sequence.incarnation > 0:
                self._send(sequence.rank, Abort(sequence.sequence_id))
            self._finish(sequence, "abort")

    def _release(self, leader: LiveSequence) -> None:
        """Start the choices that waited for this one."""
        followers, leader.followers = leader.followers, []
        for sequence in followers:
            if sequence.sequence_id in self._sequences:
                self._start(sequence)

    def _take(self, rank: int, token: TokenOutput) -> None:
        sequence = self._sequences.get(token.sequence_id)
        if sequence is None or not sequence.accepts(rank, token):
            self.num_discarded_tokens += 1
            return
        self._answered(sequence)
        self._release(sequence)
        now_s = self._system.now()
        if self.observer:
            since_token_s = None if sequence.last_token_s is None else now_s - sequence.last_token_s
            self.observer.token(now_s - sequence.request.arrival_s, since_token_s)
        sequence.last_token_s, sequence.num_deaths = now_s, 0
        self.ranks[rank].num_tokens += 1
        text, reason, stop_reason = sequence.take(token)
        logprob = token_logprob(token)
        logprobs = [logprob] if logprob is not None else None
        if token.index == 0 and sequence.sampling.prompt_logprobs is not None:
            self._emit(sequence, [], "", None, prompt_logprobs=sequence.prompt_logprobs or [])
        if reason is None:
            self._emit(sequence, [token.token_id], text, logprobs)
            return
        if token.finish_reason is None:  # a stop string: the rank cannot know
            self._send(rank, Abort(sequence.sequence_id))
        self._finish(sequence, reason, stop_reason, token_ids=[token.token_id], text=text, logprobs=logprobs)

    def _emit(
        self,
        sequence: LiveSequence,
        token_ids: list[int],
        text: str,
        logprobs: list[TokenLogprob] | None,
        finish: Finish | None = None,
        prompt_logprobs: list[TokenLogprob] | None = None,
    ) -> None:
        sequence.request.sink(
            SequenceEvent(
                prompt_index=sequence.prompt_index,
                index=sequence.index,
                token_ids=token_ids,
                text=text,
                logprobs=logprobs,
                finish=finish,
                prompt_logprobs=prompt_logprobs,
            )
        )

    def _finish(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        *,
        token_ids: list[int] | None = None,
        text: str = "",
        logprobs: list[TokenLogprob] | None = None,
        error: SwitchgearError | None = None,
    ) -> None:
        del self._sequences[sequence.sequence_id]
        request = sequence.request
        del request.sequences[sequence.sequence_id]
        if not request.sequences:
            self._requests.pop(request.request_id, None)
        if sequence.rank is None:
            self.waiting.remove(sequence)
        else:
            self._give_up_place(sequence)
        if self.observer:
            self.observer.finished(reason, self._system.now() - request.arrival_s)
        self._emit(sequence, token_ids or [], text, logprobs, sequence.finish(reason, stop_reason, error))
