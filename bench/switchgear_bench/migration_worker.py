"""One rank of `switchgear bench migration`: the real engine, transport, stager and peer channel, told what to do by a schedule.

`python -m switchgear_bench.migration_worker` reads one line of JSON from stdin and leaves its arrays in a folder. No server
stands between: every rank derives the same proposals from the same seed at the same step, so nothing but ranks is timed.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from switchgear_bench.greedy import greedy
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
    FromRank,
    MapRefused,
    MapStaged,
    StageMap,
    StepFrame,
    Stop,
    Submit,
    decode_to_rank,
    encode,
)
from switchgear_runtime.migration.background import step_back
from switchgear_runtime.migration.peer_channel import PeerChannel
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.parent_death import set_parent_death_signal
from switchgear_runtime.system import RealSystem

GENERATION = 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker does. `arms`: of each block of steps, whether experts migrate in it."""

    rank: int
    world_size: int
    folder: str
    engine: dict[str, Any]
    arms: list[bool]
    block_steps: int
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
    """Maps that swap random experts between ranks, made, encoded and decoded in a thread, as a link's reader does."""

    def __init__(self, job: Job, inbox: Inbox[Any]) -> None:
        self._job = job
        self._inbox = inbox
        self._todo: queue.SimpleQueue[tuple[int, ExpertMap]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def propose(self, epoch: int, current: ExpertMap) -> None:
        self._todo.put((epoch, current))

    def _run(self) -> None:
        step_back()
        job = self._job
        while True:
            epoch, current = self._todo.get()
            expert_map = swapped(current, np.random.default_rng((job.seed, epoch)), job.moves_per_map, epoch)
            message = StageMap(
                generation=GENERATION,
                expert_map=expert_map.to_json(),
                bytes_per_s=job.bytes_per_s,
                source=job.source,  # type: ignore[arg-type]
            )
            self._inbox.put(decode_to_rank(encode(message)))


def swapped(current: ExpertMap, rng: np.random.Generator, num_moves: int, epoch: int) -> ExpertMap:
    """Every rank gets `num_moves` experts that it did not hold: neighbours in a random ring of ranks swap."""
    physical_LRS = current.physical_to_logical_LP.reshape(current.num_layers, current.num_ranks, -1).copy()
    ring = rng.permutation(current.num_ranks).tolist()
    for one, other in zip(ring[::2], ring[1::2], strict=True):
        places = rng.permutation(current.num_layers * current.slots_per_rank)[:num_moves].tolist()
        for place in places:
            layer, slot = divmod(place, current.slots_per_rank)
            physical_LRS[layer, [one, other], slot] = physical_LRS[layer, [other, one], slot]
    return ExpertMap.of(
        physical_LRS.reshape(current.num_layers, -1),
        num_ranks=current.num_ranks,
        num_experts=current.num_experts,
        epoch=epoch,
    )


class TimedEngine(Engine):
    """Notes when each step ended, and follows the schedule."""

    def __init__(self, job: Job, proposals: Proposals, inbox: Inbox[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, inbox=inbox, **kwargs)
        self._job = job
        self._proposals = proposals
        self._own_inbox = inbox
        num_steps = len(job.arms) * job.block_steps
        self.ended_s = np.zeros(num_steps + 1)
        self.cpu_s = np.zeros(num_steps + 1)
        self.epochs = np.zeros(num_steps + 1, np.int64)
        self._proposed = 0
        self._num_done = 0

    def step(self) -> Decision:
        done = self._num_done
        group = self.membership.group
        assert group is not None
        epoch = group.expert_map.epoch
        if done < len(self.ended_s) - 1 and self._job.arms[done // self._job.block_steps]:
            if self._proposed <= epoch or self._dropped == self._proposed:
                self._proposed += 1
                self._proposals.propose(self._proposed, group.expert_map)
        elif self._proposed > epoch and self._dropped != self._proposed:
            self._dropped = self._proposed
            self._own_inbox.put(DropMap(GENERATION, self._proposed))
        decision = super().step()
        if done < len(self.ended_s):
            self.ended_s[done], self.cpu_s[done] = time.perf_counter(), time.thread_time()
            self.epochs[done] = group.expert_map.epoch
            self._num_done += 1
            if self._num_done == len(self.ended_s):
                self._own_inbox.put(Stop())
        return decision

    _dropped = -1


def run(job: Job) -> None:
    engine_config = EngineConfig(**job.engine)
    claim = claim_cpus(engine_config.num_threads, num_ranks=job.world_size)
    system = RealSystem(seed=None)
    checkpoint = Checkpoint(Path(engine_config.model))
    runner = ModelRunner(engine_config, checkpoint.spec, checkpoint, rank=job.rank, world_size=job.world_size)
    store = FolderStore(Path(job.folder))
    inbox: Inbox[Any] = Inbox(system)
    draw = random.Random(f"{job.seed} {job.rank}")
    vocab_size = checkpoint.spec.vocab_size
    staged: list[MapStaged] = []
    refused: list[str] = []
    num_tokens = 0
    next_id = 0

    def submit() -> None:
        nonlocal next_id
        next_id += 1
        prompt = [draw.randrange(1, vocab_size) for _ in range(32)]
        inbox.put(
            Submit(
                sequence_id=next_id,
                incarnation=1,
                prompt_token_ids=prompt,
                output_token_ids=[],
                sampling=greedy(draw.randrange(200, 600), draw.getrandbits(32)),
            )
        )

    def send(message: FromRank) -> None:
        nonlocal num_tokens
        if isinstance(message, StepFrame):
            num_tokens += len(message.tokens)
            for token in message.tokens:
                if token.finish_reason is not None:
                    submit()
        elif isinstance(message, MapStaged):
            staged.append(message)
        elif isinstance(message, MapRefused):
            refused.append(message.reason)

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
        Proposals(job, inbox),
        inbox,
        engine_config,
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
    for _ in range(job.batch_size):
        submit()
    gc.freeze()
    engine.run()
    np.savez(Path(job.folder) / f"rank{job.rank}.npz", ended_s=engine.ended_s, cpu_s=engine.cpu_s, epochs=engine.epochs)
    flipped = set(engine.epochs.tolist())
    answer = {
        "rank": job.rank,
        "num_tokens": num_tokens,
        "refused": refused,
        "pinned": claim is not None,
        "is_native": runner.is_native,
        "shares_weights": runner.shares_weights,
        "experts_moved": sum(message.num_experts for message in staged if message.epoch in flipped),
        "moved_bytes": sum(message.moved_bytes for message in staged if message.epoch in flipped),
        "num_flips": int((np.diff(engine.epochs) > 0).sum()),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    set_parent_death_signal(signal.SIGKILL)  # a bench that is killed leaves no ranks behind
    run(msgspec.json.decode(sys.stdin.buffer.readline(), type=Job))
    os._exit(0)
