"""One rank of `switchgear bench migration`: the real engine, transport, stager and peer channel, told what to do by a schedule.

`python -m switchgear_bench.migration_worker` reads one line of JSON from stdin and leaves its arrays in a folder. No server
stands between: every rank derives the same maps from the same seed at the same step, so nothing but ranks is timed.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from switchgear_bench.migration_traffic import MapChain, Requests
from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cpu_claim import claim_cpus
from switchgear_runtime.engine import Engine
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.header import Decision
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.messages import (
    BeginGeneration,
    DropMap,
    Fault,
    FromRank,
    MapRefused,
    MapStaged,
    StageMap,
    StepFrame,
    Stop,
    decode_to_rank,
    encode,
)
from switchgear_runtime.migration.background import step_back
from switchgear_runtime.migration.peer_channel import PeerChannel
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.parent_death import set_parent_death_signal
from switchgear_runtime.system import RealSystem

GENERATION = 1
ROUND_TIMEOUT_S = 600.0  # for others who time things on this host


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker does. `arms`: of each block of steps, whether experts migrate in it. A round is `round_blocks` of
    them, and begins when the folder has a file go-<round>."""

    rank: int
    world_size: int
    folder: str
    engine: dict[str, Any]
    arms: list[bool]
    block_steps: int
    round_blocks: int
    batch_size: int
    moves_per_map: int  # to each rank
    bytes_per_s: int  # of each rank
    source: str
    seed: int
    channel: str


class FolderStore:
    """Where the workers leave values for each other: files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, value: bytes) -> None:
        path = self._folder / key.replace("/", "-")
        path.with_suffix(".new").write_bytes(value)
        path.with_suffix(".new").rename(path)

    def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, bytes]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            paths = {key: self._folder / key.replace("/", "-") for key in keys}
            found = {key: path.read_bytes() for key, path in paths.items() if path.exists()}
            if len(found) == len(paths) or time.monotonic() > deadline_s:
                return found
            time.sleep(0.01)


class Proposals:
    """Encodes and decodes the chain's maps in a thread, as a link's reader does."""

    def __init__(self, job: Job, chain: MapChain, inbox: Inbox[Any]) -> None:
        self._job = job
        self._chain = chain
        self._inbox = inbox
        self._todo: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def propose(self, epoch: int) -> None:
        self._todo.put((epoch, self._chain.following()))

    def _run(self) -> None:
        step_back()
        while True:
            epoch, expert_map = self._todo.get()
            message = StageMap(
                generation=GENERATION,
                expert_map=expert_map | {"epoch": epoch},
                bytes_per_s=self._job.bytes_per_s,
                source=self._job.source,  # type: ignore[arg-type]
            )
            self._inbox.put(decode_to_rank(encode(message)))


class TimedEngine(Engine):
    """Follows the schedule of blocks, and notes when each step ended and what its layers took."""

    def __init__(
        self, job: Job, requests: Requests, chain: MapChain, inbox: Inbox[Any], runner: ModelRunner, **kwargs: Any
    ) -> None:
        super().__init__(runner.config, runner, inbox=inbox, **kwargs)
        self._job = job
        self._requests = requests
        self._chain = chain
        self._proposals = Proposals(job, chain, inbox)
        self._own_inbox = inbox
        self._layer_cpu_ns = runner.layer_cpu()
        self._num_steps = len(job.arms) * job.block_steps
        self._num_done = 0
        self._proposed = self._reached = 0  # epochs
        self._in_flight = False
        num_blocks, num_layers = len(job.arms), len(self._layer_cpu_ns)
        self.arrays: dict[str, Any] = {
            "began_s": np.zeros(num_blocks),
            "began_cpu_s": np.zeros(num_blocks),
            "began_process_s": np.zeros(num_blocks),
            "ended_process_s": np.zeros(num_blocks),
            "ended_s": np.zeros(self._num_steps),
            "ended_cpu_s": np.zeros(self._num_steps),
            "layer_cpu_ns": np.zeros((self._num_steps, num_layers), np.int64),
            "epochs": np.zeros(self._num_steps, np.int64),
        }

    def step(self) -> Decision:
        done, job, arrays = self._num_done, self._job, self.arrays
        if done == self._num_steps:
            return super().step()
        block, at = divmod(done, job.block_steps)
        if at == 0:
            self._begin_block(block)
        self._follow(migrates=job.arms[block])
        decision = super().step()
        arrays["ended_s"][done], arrays["ended_cpu_s"][done] = time.perf_counter(), time.thread_time()
        arrays["layer_cpu_ns"][done] = self._layer_cpu_ns
        self._layer_cpu_ns[:] = 0
        arrays["epochs"][done] = decision.epoch
        arrays["ended_process_s"][block] = time.process_time()
        self._num_done += 1
        if self._num_done == self._num_steps:
            self._mark(f"done-{len(job.arms) // job.round_blocks - 1}")
            self._own_inbox.put(Stop())
        return decision

    def _begin_block(self, block: int) -> None:
        job = self._job
        for sequence_id in self._requests.live:
            self.scheduler.abort(sequence_id)
        if block % job.round_blocks == 0:
            self._await_round(block // job.round_blocks)
        for submit in self._requests.begin_block():
            self._submit(submit)
        arrays = self.arrays
        arrays["began_process_s"][block] = time.process_time()
        arrays["began_s"][block], arrays["began_cpu_s"][block] = time.perf_counter(), time.thread_time()

    def _await_round(self, index: int) -> None:
        """Until whoever started the ranks says that the machine is ours."""
        if index:
            self._mark(f"done-{index - 1}")
        deadline_s = time.monotonic() + ROUND_TIMEOUT_S
        while not (Path(self._job.folder) / f"go-{index}").exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"rank {self.rank}: waited {ROUND_TIMEOUT_S:g} s for round {index}")
            time.sleep(0.01)

    def _mark(self, name: str) -> None:
        (Path(self._job.folder) / f"{name}-{self.rank}").touch()

    def _follow(self, *, migrates: bool) -> None:
        """Maps back to back, or none."""
        group = self.membership.group
        assert group is not None
        epoch = group.expert_map.epoch
        if epoch > self._reached:
            self._chain.advance()
            self._reached = epoch
        self._in_flight = self._in_flight and epoch < self._proposed
        if migrates and not self._in_flight:
            self._proposed += 1
            self._in_flight = True
            self._proposals.propose(self._proposed)
        elif self._in_flight and not migrates:
            self._in_flight = False
            self._own_inbox.put(DropMap(GENERATION, self._proposed))


def run(job: Job) -> None:
    engine_config = EngineConfig(**job.engine)
    claim = claim_cpus(engine_config.num_threads, num_ranks=job.world_size)
    system = RealSystem(seed=None)
    checkpoint = Checkpoint(Path(engine_config.model))
    runner = ModelRunner(engine_config, checkpoint.spec, checkpoint, rank=job.rank, world_size=job.world_size)
    store = FolderStore(Path(job.folder))
    inbox: Inbox[Any] = Inbox(system)
    requests = Requests(seed=job.seed, rank=job.rank, batch_size=job.batch_size, vocab_size=checkpoint.spec.vocab_size)
    staged: list[MapStaged] = []
    refused: list[str] = []

    def send(message: FromRank) -> None:
        if isinstance(message, StepFrame):
            for submit in requests.take(message):
                inbox.put(submit)
        elif isinstance(message, MapStaged):
            staged.append(message)
        elif isinstance(message, MapRefused):
            refused.append(message.reason)
        elif isinstance(message, Fault):
            raise SystemExit(message.message)

    def open_peers(_: GenerationDescriptor) -> PeerChannel:
        return PeerChannel(
            runner,
            store,
            rank=job.rank,
            world_size=job.world_size,
            address="127.0.0.1",
            timeout_s=engine_config.step_timeout_s,
            system=system,
            at_thread_start=step_back,
        )

    engine = TimedEngine(
        job,
        requests,
        MapChain(runner.expert_map, seed=job.seed, moves_per_map=job.moves_per_map),
        inbox,
        runner,
        rank=job.rank,
        system=system,
        send=send,
        open_transport=lambda descriptor: open_transport(
            "shm",
            descriptor,
            job.rank,
            mailbox_bytes=runner.mailbox_bytes(job.world_size),
            timeout_s=engine_config.step_timeout_s,
            network=Network(store=store, address="127.0.0.1", trusted=True),
        ),
        open_peers=open_peers,
        at_stager_start=step_back,
    )
    inbox.put(
        BeginGeneration(
            GenerationDescriptor(term=1, generation=GENERATION, world_size=job.world_size, epoch=0, channel=job.channel)
        )
    )
    gc.freeze()
    engine.run()
    np.savez(Path(job.folder) / f"rank{job.rank}.npz", **engine.arrays)
    flipped = set(engine.arrays["epochs"].tolist())
    answer = {
        "rank": job.rank,
        "num_tokens": requests.num_tokens,
        "digests": requests.digests,
        "refused": refused,
        "pinned": claim is not None,
        "is_native": runner.is_native,
        "shares_weights": runner.experts.shares_weights,
        "experts_moved": sum(message.num_experts for message in staged if message.epoch in flipped),
        "moved_bytes": sum(message.moved_bytes for message in staged if message.epoch in flipped),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    set_parent_death_signal(signal.SIGKILL)  # a bench that is killed leaves no ranks behind
    run(msgspec.json.decode(sys.stdin.buffer.readline(), type=Job))
    os._exit(0)
