"""One rank's loop: `Engine` turns messages into steps, together with the other ranks, and steps into frames of tokens.

    run():   receive messages -> step -> receive -> step ... -> park when no rank has work -> wake -> ... -> stop
    step():  agree with all ranks -> schedule -> launch -> finish (wait for the tokens, complete, emit)

Between generations (before the first, after a fault) a rank keeps its sequences and waits for the next BeginGeneration.
A fault in a step, whatever it is, aborts the transport so that no peer is left waiting, takes the step back, and is
reported as `Fault`; the step is redone in the next generation.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from switchgear_runtime import messages
from switchgear_runtime.batch import Batch
from switchgear_runtime.block_manager import BlockManager
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import RequestError, TransportAborted, TransportError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.header import Decision, StepHeader, decide
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.launched_step import FinishedStep, LaunchedStep, StepResult
from switchgear_runtime.membership import Group, Membership, OpenPeers
from switchgear_runtime.messages import FromRank, PromptLogprobs, Submit, TokenOutput, ToRank
from switchgear_runtime.migration.stager import StageOutcome
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.prompt_scorer import frames_of, score_prompts
from switchgear_runtime.sampler import Sampler
from switchgear_runtime.scheduler import Scheduler
from switchgear_runtime.sequence import Sequence
from switchgear_runtime.system import System

IDLE_WAIT_S = 5.0  # a parked rank re-arms its wait this often; every message ends it at once
LOAD_PERIOD_S = 1.0

log = logging.getLogger(__name__)


EngineMessage = ToRank | StageOutcome


class Engine:
    """`send` hands a message to the link; `open_transport` meets the other ranks of a generation; `open_peers` opens a
    channel to their experts (default: none, experts come from disk); `at_stager_start` runs in the stager's thread.
    `start_timeout_s`: for the others to come to a generation's first step, before which each loads the experts it lacks
    (default: step_timeout_s)."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        *,
        rank: int,
        system: System,
        inbox: Inbox[EngineMessage],
        send: Callable[[FromRank], None],
        open_transport: Callable[[GenerationDescriptor], Transport],
        open_peers: OpenPeers | None = None,
        at_stager_start: Callable[[], None] | None = None,
        start_timeout_s: float = 0.0,
    ) -> None:
        self.config = config
        self.runner = runner
        self.rank = rank
        self.scheduler = Scheduler(
            BlockManager(
                num_blocks=runner.num_kv_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            max_model_len=runner.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        self.sampler = Sampler()
        self.membership = Membership(
            runner,
            rank=rank,
            system=system,
            open_transport=open_transport,
            open_peers=open_peers,
            deliver=inbox.put,
            at_stager_start=at_stager_start,
            start_timeout_s=max(start_timeout_s, config.step_timeout_s),
        )
        self._start_timeout_s = max(start_timeout_s, config.step_timeout_s)
        self._system = system
        self._inbox = inbox
        self._send = send
        self._pending: deque[EngineMessage] = deque()  # drained, not yet applied
        self._load_reported_at = system.now()
        self._launched: tuple[Batch, LaunchedStep] | None = None  # and not finished
        self._has_news = False  # a generation or an epoch that no frame has told
        self._stop_requested = False
        self._stopped = False
        inbox.on_arrival = self.membership.on_arrival

    def hello(self, pid: int) -> messages.Hello:
        spec = self.runner.spec
        return messages.Hello(
            rank=self.rank,
            pid=pid,
            fingerprint=self.runner.fingerprint(),
            num_kv_blocks=self.runner.num_kv_blocks,
            block_size=self.config.block_size,
            max_model_len=self.runner.max_model_len,
            num_layers=spec.num_moe_layers,
            num_experts=spec.num_experts,
        )

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until all ranks agree to stop. Raises only when even a fault cannot be reported."""
        try:
            while not self._stopped:
                self._turn()
        finally:
            self.membership.leave(f"the engine of rank {self.rank} ended")
            self.membership.close()

    def step(self) -> Decision:
        """One turn of all ranks. When it raises, the scheduler is as before the first step that is not complete."""
        try:
            return self._step()
        except BaseException:
            self._take_back()
            raise

    def _step(self) -> Decision:
        decision = self._agree()  # run, flip to an epoch, park or stop: the same on all ranks
        if decision.kind != "run":
            self._finish()
            return decision
        self.runner.begin_step(decision)
        if not self.runner.runs_beside:
            self._finish()  # the host is busy until the next step's last layer: tokens should not wait for that
        # May be empty: all ranks step together, or combine hangs. No more than the header said, by which all chose a way.
        batch = self.scheduler.schedule(decision.num_tokens[self.rank])
        launched = self._launch(batch)
        self._finish()  # the step before, which may have run until now
        self.scheduler.advance(batch)
        self._launched = (batch, launched)
        if not (self.config.async_scheduling and launched.may_overlap):
            self._finish()
        return decision

    def _launch(self, batch: Batch) -> LaunchedStep:
        if self.runner.launches:
            return self.runner.launch(batch, self.sampler)
        logits_BV = self.runner.forward(batch)
        sampled = self.sampler(logits_BV, batch)
        scored = score_prompts(self.runner.prompt_logits(), batch) if batch.unscored else []
        return FinishedStep(StepResult(sampled, scored))

    def _take_back(self) -> None:
        """Steps that are not complete were not: the next generation redoes them."""
        self._launched = None
        self.scheduler.rollback()

    def _finish(self) -> None:
        """The step that was launched last, if it is not complete: wait for its tokens, and tell them."""
        if self._launched is None:
            return
        batch, launched = self._launched
        result = launched.finish()
        self._launched = None
        outputs = self.scheduler.complete(batch, result.tokens)
        *early, last = frames_of(result.scored)
        for parts in early:
            self._emit([], parts)
        self._emit(outputs, last)

    def _turn(self) -> None:
        try:
            self._receive()
            group = self.membership.group
            if group is not None:
                decision = self.step()
                if decision.kind == "park" and self.membership.is_settled:
                    self._park()  # else one more step first, which gives memory back that the next map may need
                elif decision.kind == "stop":
                    self._stop()
                group.step += 1
            elif self._stop_requested:
                self._stop()
            else:
                self._inbox.wait(IDLE_WAIT_S)
        except TransportError as error:
            self._fault(error)
        except Exception as error:
            log.exception("rank %d: a step failed", self.rank)
            self._fault(error)

    def _agree(self) -> Decision:
        group = self._group()
        header = StepHeader(
            rank=self.rank,
            generation=group.generation,
            step=group.step,
            epoch=group.expert_map.epoch,
            staged_epoch=self.membership.staged_epoch,
            num_tokens=self.scheduler.num_pending_tokens,
            has_work=self.scheduler.has_work,
            stop=self._stop_requested,
            map_digest=group.map_digest,
            lends=self.runner.lends,
        )
        group.offered_epoch = header.staged_epoch
        timeout_s = self.config.step_timeout_s if group.step else self._start_timeout_s
        headers = group.transport.all_gather(header.pack(), timeout_s=timeout_s)
        decision = decide([StepHeader.unpack(data) for data in headers])
        if decision.epoch != group.expert_map.epoch:
            self.membership.flip(decision.epoch)
            self._has_news = True
            self._reject_unknown_versions()
        else:
            self.membership.settle()
        return decision

    def _emit(
        self, outputs: list[TokenOutput], scored: list[PromptLogprobs] | None = None, *, report_load: bool = False
    ) -> None:
        """One frame with all that the step produced; none when that is nothing, unless it is a generation's or an
        epoch's first."""
        group = self._group()
        now = self._system.now()
        report_load = report_load or now - self._load_reported_at >= LOAD_PERIOD_S
        if not outputs and not scored and not report_load and not self._has_news:
            return
        self._has_news = False
        if report_load:
            self._load_reported_at = now
        self._send(
            messages.StepFrame(
                rank=self.rank,
                generation=group.generation,
                step=group.step,
                tokens=outputs,
                stats=self.scheduler.stats(),
                expert_load=self.runner.load.take_routed() if report_load else None,
                expert_rows=self.runner.load.take_rows() if report_load else None,
                prompt_logprobs=scored or [],
                tenant_load=self.runner.load.taken_by_tenant if report_load else {},
                epoch=group.expert_map.epoch,
            )
        )

    def _park(self) -> None:
        """Wait on the inbox until there is a reason to step. The rank whose own work ends the park tells the others."""
        group = self._group()
        self._emit([], report_load=True)
        self._send(messages.Parked(self.rank, group.generation, group.step))
        while self.membership.group is group and not self._stop_requested and group.wake_step < group.step:
            if self.scheduler.has_work or self.membership.has_offer:
                self._send(messages.Waking(self.rank, group.generation, group.step))
                return
            self._inbox.wait(IDLE_WAIT_S)
            self._receive()

    def _stop(self) -> None:
        if self.membership.group is not None:
            self._emit([], report_load=True)
        self.membership.leave(None)
        self._stopped = True
        self._send(messages.Stopped(self.rank))

    def _fault(self, error: Exception) -> None:
        """Give the generation up and say why."""
        group = self.membership.group
        self._take_back()
        self.runner.abandon()
        self.membership.leave(f"rank {self.rank} failed: {error}")
        peers = list(error.peers) if isinstance(error, TransportError) else []
        fault = messages.Fault(
            rank=self.rank,
            generation=self.membership.generation,
            step=group.step if group is not None else 0,
            kind=type(error).__name__,
            peers=peers,
            message=str(error),
        )
        log.warning("rank %d gives generation %d up: %s", self.rank, fault.generation, fault)
        self._send(fault)

    # --- messages -------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Apply all messages, those that come meanwhile included. One that fails does not take the others with it."""
        while self._pending or self._inbox.drain_into(self._pending):
            self._apply(self._pending.popleft())

    def _apply(self, message: EngineMessage) -> None:
        match message:
            case messages.Submit():
                self._submit(message)
            case messages.Submits():
                for submit in message.sequences:
                    self._submit(submit)
            case messages.Abort():
                self.scheduler.abort(message.sequence_id)
            case messages.Wake():
                group = self.membership.group
                if group is not None and message.generation == group.generation:
                    group.wake_step = max(group.wake_step, message.step)
            case messages.BeginGeneration():
                self._take_back()  # a step that was launched, since other ranks may never launch it
                self.membership.begin(message)
                self._has_news = True
                self._reject_unknown_versions()
            case messages.EndGeneration():
                if self.membership.ends(message):  # answered, also from a park: so the controller sees who lives
                    reason = f"the controller ended this generation: {message.reason}"
                    self._fault(TransportAborted(reason, rank=self.rank))
            case messages.Stop():
                self._stop_requested = True
            case messages.StageMap():
                self._answer(self.membership.stage(message))
            case messages.DropMap():
                self.membership.drop(message)
            case StageOutcome():
                self._answer(self.membership.take(message))

    def _answer(self, message: messages.MapStaged | messages.MapRefused | None) -> None:
        if message is not None:
            self._send(message)

    def _submit(self, message: Submit) -> None:
        known = self.scheduler.get(message.sequence_id)
        if known is not None and message.incarnation <= known.incarnation:
            log.warning(
                "rank %d: sequence %d is here already, incarnation %d; incarnation %d is ignored",
                self.rank,
                message.sequence_id,
                known.incarnation,
                message.incarnation,
            )
            return
        if known is not None:
            self.scheduler.abort(known.sequence_id)
        try:
            self._check_token_ids(message)
            self._check_version(message.version)
            self.scheduler.add(Sequence.from_submit(message))
        except RequestError as error:
            self._send(messages.Rejected(message.sequence_id, message.incarnation, str(error)))

    def _check_version(self, version: int) -> None:
        """Between generations the next one's versions decide."""
        group = self.membership.group
        if group is not None and not group.versions.knows(version):
            oldest, latest = group.versions.oldest, group.versions.latest
            raise RequestError(f"version={version}: this rank computes versions {oldest}..{latest}", param="version")

    def _reject_unknown_versions(self) -> None:
        """Sequences that the map or generation which has just come cannot compute; a server that counts leaves none."""
        for sequence in self.scheduler.sequences:
            try:
                self._check_version(sequence.version)
            except RequestError as error:
                self.scheduler.abort(sequence.sequence_id)
                self._send(messages.Rejected(sequence.sequence_id, sequence.incarnation, str(error)))

    def _check_token_ids(self, message: Submit) -> None:
        """An id outside the vocabulary would break a step, and with it everybody's generation."""
        vocab_size = self.runner.spec.vocab_size
        for name, token_ids in (
            ("prompt_token_ids", message.prompt_token_ids),
            ("output_token_ids", message.output_token_ids),
            ("stop_token_ids", message.sampling.stop_token_ids),
            ("logit_bias", message.sampling.logit_bias),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(f"{name}: token id {token_id} is outside 0..{vocab_size - 1}", param=name)

    def _group(self) -> Group:
        assert self.membership.group is not None, "a step outside a generation"
        return self.membership.group
