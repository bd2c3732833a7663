"""What the cluster tests share: start one, collect its tokens, find what it leaves behind."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from switchgear.cluster import Cluster
from switchgear.config import split_settings
from switchgear.launcher.local import LocalLauncher
from switchgear.server.events import Finish, SequenceEvent
from switchgear_runtime.sampling_params import SamplingParams

SMALL = {"num_kv_blocks": 64, "max_model_len": 512}
SCRIPTED_RANK = Path(__file__).with_name("scripted_rank.py")


class Collector:
    """The sink of one request."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.finishes: dict[int, Finish] = {}
        self.changed = asyncio.Event()

    def __call__(self, event: SequenceEvent) -> None:
        self.token_ids.setdefault(event.prompt_index, []).extend(event.token_ids)
        if event.finish is not None:
            assert event.prompt_index not in self.finishes
            self.finishes[event.prompt_index] = event.finish
        self.changed.set()

    async def until(self, condition: Callable[[], object], timeout_s: float = 20) -> None:
        async def wait() -> None:
            while not condition():
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), timeout_s)

    async def all_finished(self, num_prompts: int, timeout_s: float = 20) -> list[Finish]:
        await self.until(lambda: len(self.finishes) == num_prompts, timeout_s)
        return [self.finishes[index] for index in range(num_prompts)]


def submit(cluster: Cluster, prompts: object, **params: Any) -> Collector:
    collector = Collector()
    cluster.core.submit(prompts, SamplingParams(temperature=0.0, **params), sink=collector)
    return collector


class LogprobCollector(Collector):
    """Tokens with their logprobs, as hexadecimal floats: equal bits or not equal."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: dict[int, list[str]] = {}

    def __call__(self, event: SequenceEvent) -> None:
        logprobs = [float(entry.logprob).hex() for entry in event.logprobs or ()]
        self.logprobs.setdefault(event.prompt_index, []).extend(logprobs)
        super().__call__(event)


PROMPTS = ["The sun rises in the", "def fibonacci(n):", "Once upon a time", "1 + 1 ="]


Answers = dict[int, tuple[list[int], list[str]]]


async def answers(cluster: Cluster) -> Answers:
    """What a cluster makes of PROMPTS, once greedy and once sampled."""
    found = {}
    for half, temperature in enumerate((0.0, 1.0)):
        collector = LogprobCollector()
        params = SamplingParams(temperature=temperature, seed=7, max_tokens=25, ignore_eos=True, logprobs=2)
        cluster.core.submit(PROMPTS, params, sink=collector)
        finishes = await collector.all_finished(len(PROMPTS), 60)
        assert {finish.reason for finish in finishes} == {"length"}, finishes
        for index in range(len(PROMPTS)):
            found[2 * index + half] = collector.token_ids[index], collector.logprobs[index]
    return found


async def tokens_and_logprobs(
    cluster: Cluster, scenario: Callable[[Cluster], Awaitable[None]] | None = None
) -> Answers:
    """A cluster's answers, after the scenario, if any. Starts it, and stops it."""
    await asyncio.wait_for(cluster.start(), 120)
    try:
        if scenario is not None:
            await scenario(cluster)
        return await answers(cluster)
    finally:
        await cluster.stop(0.5)


async def until(condition: Callable[[], object], timeout_s: float) -> float:
    """Seconds until it holds."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while not condition():
        assert loop.time() - start < timeout_s, f"it did not happen within {timeout_s} s"
        await asyncio.sleep(0.01)
    return loop.time() - start


def scripted(script: str, ranks: int = 2, **settings: Any) -> Cluster:
    """A cluster of ranks without a model."""
    config, engine = split_settings({"ranks": ranks, "launcher": "local", "start_timeout_s": 20.0, **settings})
    command = (sys.executable, str(SCRIPTED_RANK), script)
    return Cluster(config, engine, launcher=lambda on_exit: LocalLauncher(on_exit, command))


def real(launcher: str, ranks: int = 2, **settings: Any) -> Cluster:
    config, engine = split_settings({"ranks": ranks, "launcher": launcher, **SMALL, **settings})
    return Cluster(config, engine)


def play(cluster: Cluster, scenario: Callable[[Cluster], Awaitable[None]], timeout_s: float = 120) -> None:
    """Start, run the scenario, stop; then nothing may be left."""

    async def run() -> None:
        await cluster.start()
        try:
            await scenario(cluster)
        finally:
            await cluster.stop(0.5)

    before = Leavings.now()
    asyncio.run(asyncio.wait_for(run(), timeout_s))
    before.check()


def rank_pids(cluster: Cluster) -> list[int]:
    return [hello.pid for hello in cluster.controller.hellos]


async def idle_percent(cluster: Cluster, duration_s: float) -> float:
    """CPU of the cluster's loop and of all ranks, together, while nobody asks for anything; in percent of one core.

    Runs on that loop, whose thread alone is counted: the tests' process has others. The median of three windows.
    """
    ranks = [psutil.Process(pid) for pid in rank_pids(cluster)]

    def cpu_s() -> float:
        return time.thread_time() + sum(sum(rank.cpu_times()[:2]) for rank in ranks)

    await asyncio.sleep(1)  # let the last steps and their frames settle
    windows = []
    for _ in range(3):
        before = cpu_s()
        await asyncio.sleep(duration_s)
        windows.append(100 * (cpu_s() - before) / duration_s)
    return median(windows)


class Leavings:
    """What this process's clusters could leave: children, names in /dev/shm, entries of the temporary folder."""

    def __init__(self, processes: set[int], segments: set[str], files: set[str]) -> None:
        self.processes = processes
        self.segments = segments
        self.files = files

    @classmethod
    def now(cls) -> Leavings:
        children = psutil.Process().children(recursive=True)
        processes = {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}
        segments = {
            name for name in (path.name for path in Path("/dev/shm").iterdir()) if name.startswith(("sg-", "plasma"))
        }
        files = {
            name
            for name in (path.name for path in Path(tempfile.gettempdir()).iterdir())
            if name.startswith(("sg-", "switchgear-", "ray"))
        }
        return cls(processes, segments, files)

    def check(self, timeout_s: float = 3) -> None:
        """Nothing beyond `self`. What is left stays left, so a while is given to names that others use in passing."""
        deadline = time.monotonic() + timeout_s
        while True:
            after = Leavings.now()
            left = [after.processes - self.processes, after.segments - self.segments, after.files - self.files]
            if not any(left):
                return
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)
