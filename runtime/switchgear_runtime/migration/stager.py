"""Brings a map's experts to this rank in a thread of its own, while steps run: `Stager`.

    stage(job) -> ... -> deliver(StageOutcome)      cancel() -> no outcome

It touches nothing that a step reads: what it makes is a StagedMap, and the engine alone puts that into use. Experts come
from the host's weight cache where there is one; else from a rank that computes with them now, or from the checkpoint.
On devices a rank's memory is read in place where it is mapped; a connection to it is the last resort, since experts then
go through both hosts.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from switchgear_runtime.errors import CheckpointError, ConfigError, SwitchgearError, TransportError
from switchgear_runtime.messages import StageMap
from switchgear_runtime.migration.pace import Pace, StagingCancelled
from switchgear_runtime.migration.peers import ExpertPeers
from switchgear_runtime.model.staged_map import StagedMap
from switchgear_runtime.model.weight_store import ExpertWeights
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions
from switchgear_runtime.system import System

_IDLE_WAIT_S = 60.0

Way = Literal["mapped", "peer", "disk"]  # MapStaged.sources

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageJob:
    """A StageMap that was accepted, and the circumstances. `current`, `versions`: the map and the model's versions in
    use; `peers`: None where ranks have no channel for experts; `sources`: how many experts came which way."""

    message: StageMap
    epoch: int
    current: Callable[[], ExpertMap]
    versions: Callable[[], ModelVersions]
    peers: ExpertPeers | None
    pace: Pace
    started_s: float
    sources: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageOutcome:
    """What became of a job. `staged`, or the reason why not."""

    job: StageJob
    staged: StagedMap | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class _State:
    waiting: deque[StageJob] = field(default_factory=deque)
    running: StageJob | None = None
    closed: bool = False


class Stager:
    """One job at a time, in order. `deliver` is called in the stager's thread, `at_start` once, in it."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        rank: int,
        system: System,
        deliver: Callable[[StageOutcome], None],
        at_start: Callable[[], None] | None = None,
    ) -> None:
        self._runner = runner
        self._rank = rank
        self._system = system
        self._deliver = deliver
        self._at_start = at_start
        self._condition = system.condition()
        self._state = _State()
        self._is_started = False

    def stage(self, job: StageJob) -> None:
        with self._condition:
            self._state.waiting.append(job)
            self._condition.notify_all()
        if not self._is_started:  # a rank that never moves an expert has no such thread
            self._is_started = True
            self._system.spawn(f"stager-{self._rank}", self._run)

    @property
    def num_jobs(self) -> int:
        return len(self._state.waiting) + (self._state.running is not None)

    def cancel(self, epoch: int | None = None) -> None:
        """Give up the jobs of this epoch, or all; none of them has an outcome any more, unless it is on its way."""
        with self._condition:
            state = self._state
            jobs = [*state.waiting, *([state.running] if state.running is not None else [])]
            dropped = [job for job in jobs if epoch in (None, job.epoch)]
            state.waiting = deque(job for job in state.waiting if job not in dropped)
        for job in dropped:
            job.pace.cancel()

    def wait_idle(self, timeout_s: float) -> bool:
        """After `cancel`: True once no job runs, so that the runner may load by itself."""
        with self._condition:
            return self._condition.wait_for(lambda: self._state.running is None, timeout_s)

    def close(self) -> None:
        """End the thread, soon."""
        self.cancel()
        with self._condition:
            self._state.closed = True
            self._condition.notify_all()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._at_start is not None:
            self._at_start()
        while (job := self._next()) is not None:
            outcome = self._stage(job)
            with self._condition:
                self._state.running = None
                self._condition.notify_all()
            if outcome is not None and not job.pace.cancelled:
                self._deliver(outcome)
            del outcome, job  # or what was staged would stay in memory until the next job ends

    def _next(self) -> StageJob | None:
        state = self._state
        while True:
            with self._condition:
                self._condition.wait_for(lambda: state.closed or bool(state.waiting), _IDLE_WAIT_S)
                if state.closed:
                    return None
                if state.waiting:
                    state.running = state.waiting.popleft()
                    return state.running

    def _stage(self, job: StageJob) -> StageOutcome | None:
        try:
            expert_map = ExpertMap.from_json(job.message.expert_map)
            self._check(job, expert_map)
            versions = self._versions(job)
            staged = self._runner.stage(
                expert_map, versions, lambda layer, expert, swap: self._read(job, layer, expert, swap)
            )
        except StagingCancelled:
            return None
        except (SwitchgearError, OSError) as error:
            reason = str(error)
        except Exception as error:
            log.exception("rank %d: the map of epoch %d cannot be staged", self._rank, job.epoch)
            reason = f"{type(error).__name__}: {error}"
        else:
            return StageOutcome(job=job, staged=staged, seconds=self._system.now() - job.started_s)
        return StageOutcome(job=job, reason=f"rank {self._rank}: {reason}")

    def _check(self, job: StageJob, expert_map: ExpertMap) -> None:
        """Its own experts and those it computes with meanwhile have to fit; other ranks check theirs. A rank that is
        above its pool already, because ranks joined, may stage what adds nothing."""
        current = job.current()
        if expert_map.num_ranks != current.num_ranks or expert_map.num_layers != current.num_layers:
            raise ConfigError(
                f"expert map: it is for {expert_map.num_ranks} ranks and {expert_map.num_layers} layers; this "
                f"generation has {current.num_ranks} and {current.num_layers}"
            )
        held = [_held(current, layer, self._rank) for layer in range(current.num_layers)]
        num_pairs = sum(len(_held(expert_map, layer, self._rank) | on_layer) for layer, on_layer in enumerate(held))
        if num_pairs > max(self._runner.pool_slots, sum(map(len, held))):
            raise ConfigError(
                f"expert map: {num_pairs} experts would be held while they are staged, the slot pool has "
                f"{self._runner.pool_slots}; move fewer at a time, or raise survive"
            )

    def _versions(self, job: StageJob) -> ModelVersions:
        current = job.versions()
        if job.message.versions is None:
            return current
        versions = ModelVersions.from_json(job.message.versions)
        if not versions.follows(current):
            raise ConfigError(
                f"model versions {versions.oldest}..{versions.latest}: they do not follow from those in force, "
                f"{current.oldest}..{current.latest}"
            )
        return versions

    def _read(self, job: StageJob, moe_layer: int, expert: int, swap: ExpertSwap | None) -> ExpertWeights:
        """Weights that this rank does not hold."""
        if job.pace.cancelled:
            raise StagingCancelled
        *first, last = self._ways(job, moe_layer, expert, swap)
        for way in first:
            try:
                weights = self._take(way, job, moe_layer, expert, swap)
            except (TransportError, CheckpointError, OSError) as error:
                text = "rank %d: expert %d of MoE layer %d comes another way than %s: %s"
                log.info(text, self._rank, expert, moe_layer, way, str(error))  # the error itself refers to the weights
                continue
            if weights is not None:
                return weights
        weights = self._take(last, job, moe_layer, expert, swap)
        assert weights is not None
        return weights

    def _ways(self, job: StageJob, moe_layer: int, expert: int, swap: ExpertSwap | None) -> list[Way]:
        """In the order in which they are tried."""
        source, by_channel = job.message.source, job.peers is not None
        if source == "checkpoint" or not self._is_from_peer(job, moe_layer, expert, swap):
            return ["disk"]
        if self._runner.experts.reads_peers:
            if source == "peer" and by_channel:
                return ["mapped", "peer"]
            return ["mapped", "disk", "peer"] if by_channel else ["mapped", "disk"]
        if not by_channel:
            return ["disk"]
        return ["peer"] if source == "peer" else ["peer", "disk"]

    def _take(
        self, way: Way, job: StageJob, moe_layer: int, expert: int, swap: ExpertSwap | None
    ) -> ExpertWeights | None:
        """None: this way does not lead there."""
        if way == "disk":
            weights: ExpertWeights | None = self._runner.experts.read(moe_layer, expert, swap, job.pace)
        else:
            current = job.current()
            holders = [slot // current.slots_per_rank for slot in current.replicas(moe_layer, expert)]
            first = (self._rank + expert) % len(holders)
            if way == "mapped":
                pull = self._runner.experts.pull
                pulls = (pull(one, moe_layer, expert, swap, job.pace) for one in holders[first:] + holders[:first])
                weights = next((found for found in pulls if found is not None), None)
            else:
                weights = self._fetch(job, holders[first], moe_layer, expert, swap)
        if weights is not None:
            job.sources[way] += 1
        return weights

    def _is_from_peer(self, job: StageJob, moe_layer: int, expert: int, swap: ExpertSwap | None) -> bool:
        """Only a file has what no slot holds yet. What slots hold comes from there, if not from a shared weight cache."""
        if swap is None:
            return job.message.source == "peer" or not self._runner.experts.shares_weights
        return job.versions().settled(moe_layer, expert) == swap

    def _fetch(self, job: StageJob, holder: int, moe_layer: int, expert: int, swap: ExpertSwap | None) -> ExpertWeights:
        assert job.peers is not None
        gate_up, down = self._runner.experts.empty(moe_layer, expert)
        out = gate_up.data.numpy().data, down.data.numpy().data
        job.peers.fetch(holder, moe_layer, expert, out, job.pace, "" if swap is None else swap.sha256)
        return gate_up, down


def _held(expert_map: ExpertMap, layer: int, rank: int) -> set[int]:
    return set(expert_map.local_experts(layer, rank).tolist()) - {EMPTY}
