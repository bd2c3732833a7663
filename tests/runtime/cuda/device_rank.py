"""One rank as a process of its own: an engine on a device, without a server. `python device_rank.py` reads a job, a line of
JSON, serves its requests beside the other ranks' and writes what became of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scheduling import make_submit
from tiny_cluster import make_config

from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.engine import Engine
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.messages import BeginGeneration, Fault, FromRank, MapRefused, StageMap, StepFrame, Stop
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import RealSystem

NUM_MAPS = 2


def run(job: dict[str, Any]) -> dict[str, Any]:
    rank, world_size = job["rank"], job["world_size"]
    config = make_config(Path(job["model"]), device=job["device"], transport="auto", max_num_seqs=8, **job["settings"])
    system = RealSystem(seed=0)
    checkpoint = Checkpoint(Path(config.model))
    runner = ModelRunner(config, checkpoint.spec, checkpoint, rank=rank, world_size=world_size)
    inbox: Inbox[Any] = Inbox(system)
    tokens: dict[int, list[int]] = {request["sequence_id"]: [] for request in job["requests"]}
    running = set(tokens)
    epochs: list[int] = []
    failures: list[str] = []

    def send(message: FromRank) -> None:
        if isinstance(message, StepFrame):
            epochs.append(message.epoch)
            for token in message.tokens:
                tokens[token.sequence_id].append(token.token_id)
                if token.finish_reason is not None:
                    running.discard(token.sequence_id)
            if not running and max(epochs) == NUM_MAPS:
                inbox.put(Stop())
        elif isinstance(message, Fault | MapRefused):
            failures.append(str(message))
            inbox.put(Stop())

    engine = Engine(
        config,
        runner,
        rank=rank,
        system=system,
        inbox=inbox,
        send=send,
        open_transport=lambda descriptor: open_transport(
            config.transport,
            descriptor,
            rank,
            mailbox_bytes=runner.mailbox_bytes(world_size),
            timeout_s=config.step_timeout_s,
            device=runner.device,
        ),
    )
    descriptor = GenerationDescriptor(term=1, generation=1, world_size=world_size, epoch=0, channel=job["channel"])
    inbox.put(BeginGeneration(descriptor))
    for request in job["requests"]:
        inbox.put(make_submit(**request))
    draw = np.random.default_rng(job["seed"])
    for epoch in range(1, NUM_MAPS + 1):
        expert_map = ExpertMap.random(draw, 2, 8, world_size, num_redundant=1, epoch=epoch)
        inbox.put(StageMap(generation=1, expert_map=expert_map.to_json()))
    engine.run()
    assert runner._device is not None
    small = runner._device._small
    return {
        "tokens": tokens,
        "failures": failures,
        "last_epoch": max(epochs),
        "num_replays": small.num_replays,
        "num_captures": small.num_captures,
    }


if __name__ == "__main__":
    json.dump(run(json.loads(sys.stdin.readline())), sys.stdout)
