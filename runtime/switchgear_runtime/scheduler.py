"""Which tokens of which sequences a step computes: `Scheduler`. Imports no torch.

Strictly first come, first served: `running` and then `waiting` are in order of arrival, the head of `waiting` blocks
those behind it, and the last arrived is preempted first, so the oldest always advances and nobody starves. A step has
an exact token budget. Running sequences take theirs first (one token each, but for the last, which may be in
mid-prefill); what is left goes to the waiting. A preempted sequence loses its blocks and later computes prompt and
outputs again as one prefill; tokens once sampled never change.

    batch = schedule()  ->  postprocess(batch, sampled)   the step completed: advance, publish blocks, finish
                        ->  rollback()                    it broke: as if it had not been scheduled

Postprocess is `advance` and `complete`. In between, the next step may be scheduled: what the step draws then counts as
tokens to come, `pending_token(row)` by its row of the step, which the next one computes without knowing. A sequence
that turns out to have ended has a row too many in that step, of which nothing is kept.

What rollback cannot bring back is what the broken steps may have overwritten: a block handed out to them is no longer in
the prefix cache, and a sequence preempted for them stays preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import islice

from switchgear_runtime.batch import Batch, SampledToken, ScheduledSequence
from switchgear_runtime.block_manager import BlockManager
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import RankStats, TokenOutput
from switchgear_runtime.sequence import Sequence

OPEN_STEPS_MAX = 2


def pending_token(row: int) -> int:
    """In place of a token id: the token that the step before draws in this row."""
    return -1 - row


@dataclass(slots=True)
class _OpenStep:
    """What `rollback` needs."""

    batch: Batch = field(default_factory=Batch)
    advanced: bool = False
    table_lengths: dict[int, int] = field(default_factory=dict)  # by sequence id, of running sequences
    admitted: list[tuple[Sequence, bool]] = field(default_factory=list)  # and: for the first time?


class Scheduler:
    """One rank's queues. Not thread-safe; `add` and `abort` not between `schedule` and `advance`."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool,
    ) -> None:
        self.blocks = blocks
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._num_arrivals = 0
        self._open: deque[_OpenStep] = deque()  # the oldest first
        self.num_preemptions = 0
        self.num_computed_tokens = 0
        self.prefix_cache_hit_tokens = 0
        self.prefix_cache_query_tokens = 0

    # --- between steps --------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def num_pending_tokens(self) -> int:
        """About how many tokens the next step would compute; exact unless blocks or sequences run short."""
        total = 0
        num_admissible = self.max_num_seqs - len(self.running)
        for sequence in (*self.running, *islice(self.waiting, max(0, num_admissible))):
            total += self._num_schedulable(sequence)
            if total >= self.max_num_batched_tokens:
                return self.max_num_batched_tokens
        return total

    @property
    def sequences(self) -> list[Sequence]:
        """All that are not finished, in order of arrival."""
        return list(self._by_id.values())

    def get(self, sequence_id: int) -> Sequence | None:
        return self._by_id.get(sequence_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises RequestError for one that could never run here."""
        assert self._is_settled
        self._check(sequence)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._by_id[sequence.sequence_id] = sequence
        self.waiting.append(sequence)

    def abort(self, sequence_id: int) -> bool:
        """Forget a sequence and free its blocks; False when it is not here (finished, or never was)."""
        assert self._is_settled
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            return False
        (self.running if sequence.status == "running" else self.waiting).remove(sequence)
        self._forget(sequence)
        return True

    def stats(self) -> RankStats:
        return RankStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_blocks=self.blocks.num_free_blocks,
            num_total_blocks=self.blocks.num_blocks,
            num_preemptions=self.num_preemptions,
            num_computed_tokens=self.num_computed_tokens,
            prefix_cache_hit_tokens=self.prefix_cache_hit_tokens,
            prefix_cache_query_tokens=self.prefix_cache_query_tokens,
        )

    # --- a step ---------------------------------------------------------------------------------------------------

    @property
    def _is_settled(self) -> bool:
        """Every open step has advanced."""
        return all(step.advanced for step in self._open)

    def schedule(self, num_tokens_max: int | None = None) -> Batch:
        """`num_tokens_max`: a budget below the scheduler's own, of what `num_pending_tokens` was."""
        assert self._is_settled
        assert len(self._open) < OPEN_STEPS_MAX
        step = _OpenStep()
        self._open.append(step)
        num_preemptions = self.num_preemptions
        budget = self.max_num_batched_tokens if num_tokens_max is None else num_tokens_max
        assert budget <= self.max_num_batched_tokens
        scheduled = self._schedule_running(step, budget)
        if self.num_preemptions == num_preemptions:  # else blocks are short: none for newcomers
            num_scheduled = sum(entry.num_tokens for entry in scheduled)
            scheduled += self._schedule_waiting(step, budget - num_scheduled)
        assert scheduled or not self.has_work or len(self._open) > 1 or num_tokens_max is not None
        step.batch = Batch(tuple(scheduled))
        return step.batch

    def postprocess(self, batch: Batch, sampled: Items[SampledToken]) -> list[TokenOutput]:
        """The step completed: append `sampled` (in the order of `batch.sampling`), publish blocks, end what ends."""
        self.advance(batch)
        return self.complete(batch, sampled)

    def advance(self, batch: Batch) -> None:
        """The step was launched: its tokens count as computed, and what it draws as tokens to come."""
        step = self._open[-1]
        assert step.batch is batch
        assert not step.advanced
        step.advanced = True
        row = 0
        for entry in batch:
            sequence = entry.sequence
            sequence.num_computed_tokens = entry.end
            if entry.samples:
                sequence.token_ids.append(pending_token(row))
                row += 1

    def complete(self, batch: Batch, sampled: Items[SampledToken]) -> list[TokenOutput]:
        """The oldest step is over, and these are its tokens."""
        step = self._open.popleft()
        assert step.batch is batch
        assert step.advanced
        outputs: list[TokenOutput] = []
        tokens = iter(sampled)
        for entry in batch:
            sequence = entry.sequence
            token = next(tokens) if entry.samples else None
            self.num_computed_tokens += entry.num_tokens
            if sequence.status == "finished":  # by the step before, or aborted since
                continue
            if unscored := entry.unscored:
                sequence.num_prompt_logprobs = unscored.stop
            if token is not None:
                sequence.token_ids[entry.end] = token.token_id
            if sequence.status == "running" and sequence.num_computed_tokens >= entry.end:  # not preempted since
                self.blocks.publish(sequence, entry.start, entry.end)
            if token is not None:
                outputs.append(self._output(sequence, entry.end, token))
        assert next(tokens, None) is None, "more tokens sampled than sequences"
        return outputs

    def rollback(self) -> None:
        """All open steps broke; see the module's text."""
        while self._open:
            self._rollback(self._open.pop())

    def _rollback(self, step: _OpenStep) -> None:
        if step.advanced:
            self._take_back(step.batch)
        for sequence, first_time in reversed(step.admitted):
            if sequence.status != "running":  # it ended, or a later step preempted it
                continue
            assert self.running[-1] is sequence
            self.running.pop()
            self._to_waiting(sequence)
            if first_time:
                self.prefix_cache_hit_tokens -= sequence.num_cached_tokens or 0
                self.prefix_cache_query_tokens -= sequence.num_tokens
                sequence.num_cached_tokens = None
        for entry in step.batch:
            table_length = step.table_lengths.get(entry.sequence.sequence_id)
            if table_length is not None and entry.sequence.status == "running":
                self.blocks.free(entry.sequence, keep=table_length)

    def _take_back(self, batch: Batch) -> None:
        """What `advance` did."""
        for entry in batch:
            sequence = entry.sequence
            if sequence.status == "finished":
                continue
            if entry.samples:
                assert sequence.token_ids[-1] < 0
                sequence.token_ids.pop()
            if sequence.status == "running":
                sequence.num_computed_tokens = entry.start

    def _num_schedulable(self, sequence: Sequence) -> int:
        """Not computed yet, unless it surely ends with a token that is being drawn."""
        return 0 if sequence.is_full(self.max_model_len) else sequence.num_uncomputed_tokens

    def _schedule_running(self, step: _OpenStep, budget: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        index = 0
        while index < len(self.running) and budget > 0:  # preemption shortens `running` from its end
            sequence = self.running[index]
            num_tokens = min(self._num_schedulable(sequence), budget)
            if num_tokens == 0:
                index += 1
                continue
            table_length = len(sequence.block_table)
            if not self._make_room(sequence, num_tokens):
                break
            step.table_lengths[sequence.sequence_id] = table_length
            scheduled.append(_entry(sequence, num_tokens))
            budget -= num_tokens
            index += 1
        return scheduled

    def _schedule_waiting(self, step: _OpenStep, budget: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            sequence = self.waiting[0]
            hits = self.blocks.match(sequence)[: sequence.num_reusable_tokens // self.blocks.block_size]
            num_cached = len(hits) * self.blocks.block_size
            num_missing = sequence.num_tokens - num_cached
            if num_missing > budget and self._must_be_whole(num_missing):
                break
            if not self.blocks.fits(sequence, hits):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.status = "running"
            self.blocks.share(sequence, hits)
            sequence.num_computed_tokens = num_cached
            step.admitted.append((sequence, sequence.num_cached_tokens is None))
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = num_cached
                self.prefix_cache_hit_tokens += num_cached
                self.prefix_cache_query_tokens += sequence.num_tokens
            num_tokens = min(num_missing, budget)
            allocated = self.blocks.allocate(sequence, num_cached + num_tokens)
            assert allocated, "fits() said yes"
            scheduled.append(_entry(sequence, num_tokens))
            budget -= num_tokens
        return scheduled

    def _must_be_whole(self, num_tokens: int) -> bool:
        """Without chunked prefill a prompt takes one step. Prompt and outputs computed again may be longer than any
        step; only those are split."""
        return not self.enable_chunked_prefill and num_tokens <= self.max_num_batched_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens` more tokens, preempting from the end; False when `sequence` itself had to go."""
        while not self.blocks.allocate(sequence, sequence.num_computed_tokens + num_tokens):
            victim = self.running.pop()
            self._to_waiting(victim)
            victim.num_preemptions += 1
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _to_waiting(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = "waiting"
        self.waiting.appendleft(sequence)

    def _output(self, sequence: Sequence, place: int, token: SampledToken) -> TokenOutput:
        """Of the token that now is at `place`; ends the sequence where that ends it."""
        index = place - sequence.num_prompt_tokens
        finish_reason = sequence.finish_reason(self.max_model_len, num_tokens=place + 1)
        if finish_reason is not None:
            (self.running if sequence.status == "running" else self.waiting).remove(sequence)
            self._forget(sequence)
        return TokenOutput(
            sequence_id=sequence.sequence_id,
            incarnation=sequence.incarnation,
            index=index,
            token_id=token.token_id,
            finish_reason=finish_reason,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
            num_cached_tokens=min(sequence.num_cached_tokens or 0, sequence.num_prompt_tokens) if index == 0 else None,
        )

    def _forget(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        sequence.status = "finished"
        del self._by_id[sequence.sequence_id]

    def _check(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self._by_id:
            raise RequestError(f"sequence_id={sequence.sequence_id} is already here", param="sequence_id")
        if sequence.num_prompt_tokens == 0:
            raise RequestError("the prompt has no tokens; give at least one", param="prompt")
        num_tokens_max = sequence.num_tokens_max(self.max_model_len)
        if sequence.num_tokens >= num_tokens_max:
            raise RequestError(
                f"prompt and outputs have {sequence.num_tokens} tokens, so none can follow within max_tokens="
                f"{sequence.sampling.max_tokens} and max_model_len={self.max_model_len}; shorten the prompt",
                param="prompt",
            )
        if not self.enable_chunked_prefill and sequence.num_prompt_tokens > self.max_num_batched_tokens:
            raise RequestError(
                f"the prompt has {sequence.num_prompt_tokens} tokens, max_num_batched_tokens="
                f"{self.max_num_batched_tokens}, and without chunked prefill a prompt must fit one step; "
                "shorten it, raise the limit or enable chunked prefill",
                param="prompt",
            )
        num_needed = self.blocks.num_blocks_for(num_tokens_max - 1)  # the last token is never computed
        if num_needed > self.blocks.num_blocks:
            raise RequestError(
                f"prompt and outputs may take {num_tokens_max} tokens = {num_needed} KV blocks and this rank has "
                f"{self.blocks.num_blocks}; lower max_tokens or raise num_kv_blocks",
                param="max_tokens",
            )


def _entry(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    start = sequence.num_computed_tokens
    return ScheduledSequence(sequence, start, num_tokens, samples=start + num_tokens == sequence.num_tokens)
