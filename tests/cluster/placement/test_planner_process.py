"""The planner as a process: what goes over the pipe is what arrives, and its death or silence harms nobody."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from placement_rig import COST

from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.planner_process import PlannerLost, PlannerProcess
from switchgear.placement.planner_protocol import (
    PREFIX,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    frame_length,
)
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.topology import Topology
from switchgear.placement.worker import answer
from switchgear_runtime.errors import WireError
from switchgear_runtime.moe.expert_map import ExpertMap


def make_request(seed: int = 0, policy: str = "incremental") -> PlanRequest:
    rng = np.random.default_rng(seed)
    num_layers, num_experts, num_ranks = int(rng.integers(1, 4)), int(rng.integers(4, 12)), int(rng.integers(2, 4))
    return PlanRequest(
        request_id=seed,
        policy=policy,
        windows_WLE=rng.integers(0, 10_000, (int(rng.integers(1, 4)), num_layers, num_experts)),
        current=ExpertMap.contiguous(num_layers, num_experts, num_ranks, epoch=seed),
        previous=ExpertMap.random(rng, num_layers, num_experts, num_ranks) if seed % 2 else None,
        problem=PlacementProblem(
            topology=Topology.even(num_ranks),
            slots_per_rank=num_experts,
            pool_slots=num_layers * num_experts if seed % 3 else None,
            cost=COST,
            byte_budget=None if seed % 2 else 5000,
            replica_budget_per_layer=None,
            pinned={(0, 1): (0,)} if seed % 5 == 0 else {},
            num_steps=seed + 1,
        ),
    )


def same(one: PlanReply, other: PlanReply) -> bool:
    """But for the time it took."""
    times = {one.plan_s, other.plan_s}
    assert all(time_s >= 0 for time_s in times)
    return (one.request_id, one.plan, one.current_s, one.previous_s, one.error) == (
        other.request_id,
        other.plan,
        other.current_s,
        other.previous_s,
        other.error,
    )


@pytest.mark.parametrize("seed", range(12))
def test_round_trips(seed: int) -> None:
    request = make_request(seed)
    data = encode_request(request)
    assert frame_length(data[: PREFIX.size]) == len(data) - PREFIX.size
    back = decode_request(data[PREFIX.size :])
    assert np.array_equal(back.windows_WLE, request.windows_WLE)
    assert (back.request_id, back.policy, back.current, back.previous, back.problem) == (
        request.request_id,
        request.policy,
        request.current,
        request.previous,
        request.problem,
    )
    reply = answer(request)
    assert reply.error == ""
    assert same(decode_reply(encode_reply(reply)[PREFIX.size :]), reply)


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x93\x01", encode_request(make_request())[PREFIX.size : -3]])
def test_a_broken_frame_is_refused(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError):
            decode(data)


def test_a_policy_without_a_plan_says_why() -> None:
    reply = answer(make_request(policy="clairvoyant"))
    assert reply.plan is None
    assert "clairvoyant" in reply.error


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def test_the_process_answers_dies_and_is_started_again(loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        planner = PlannerProcess()
        assert planner.pid is None  # nothing is started before there is something to plan
        try:
            first = await planner.ask(make_request(1))
            assert same(first, answer(make_request(1)))
            pid = planner.pid
            assert same(await planner.ask(make_request(2)), answer(make_request(2)))
            assert planner.pid == pid
            await planner.restart()
            try:
                await planner.ask(make_request(3))
            except PlannerLost as error:
                assert "SIGKILL" in str(error)  # asked before it was seen gone
            assert same(await planner.ask(make_request(3)), answer(make_request(3)))
            assert planner.pid != pid
        finally:
            await planner.close()

    loop.run(scenario())


def test_a_process_that_hangs_can_be_ended_by_others(loop: asyncio.Runner) -> None:
    async def scenario() -> None:
        planner = PlannerProcess([sys.executable, "-c", "import time; time.sleep(60)"])
        asking = asyncio.create_task(planner.ask(make_request()))
        while planner.pid is None:
            await asyncio.sleep(0.01)
        begun_s = time.monotonic()
        await planner.restart()
        with pytest.raises(PlannerLost, match="killed by SIGKILL"):
            await asking
        assert time.monotonic() - begun_s < 30
        await planner.close()

    loop.run(scenario())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([sys.executable, "-c", "raise SystemExit('no numpy here')"], "no numpy here"),
        (
            [sys.executable, "-c", "import sys; sys.stdout.buffer.write(b'hello, server' * 9); sys.stdin.read(9)"],
            "protocol",
        ),
        (["/nowhere/python"], "does not start"),
    ],
)
def test_a_process_that_cannot_plan_says_why(loop: asyncio.Runner, command: list[str], expected: str) -> None:
    async def scenario() -> None:
        planner = PlannerProcess(command)
        with pytest.raises(PlannerLost, match=expected):
            await planner.ask(make_request())
        await planner.close()

    loop.run(scenario())


HANGS = """
import sys, time
from switchgear.placement import worker

def serve(*_):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

worker.serve = serve
worker.main()
"""
OWNER = """
import subprocess, sys, time
planner = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(planner.pid, flush=True)
time.sleep(60)
"""


def test_a_planner_that_hangs_in_a_plan_dies_with_the_server() -> None:
    command = [sys.executable, "-c", OWNER, HANGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        planner = psutil.Process(int(owner.stdout.readline()))
        assert owner.stderr.readline() == "ready\n"
        owner.kill()
        try:
            planner.wait(5.0)
        finally:
            if planner.is_running() and planner.status() != psutil.STATUS_ZOMBIE:
                planner.kill()
