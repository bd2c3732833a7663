"""Cluster with the bundled model on local processes: deaths, hangs, start errors, idleness, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster_rig import Leavings, idle_percent, play, rank_pids, real, submit, until

from switchgear.cluster import Cluster
from switchgear.config import bundled_model
from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.ranks
PROMPTS = ["The sun rises in the", "def fibonacci(n):", "Once upon a time", "1 + 1 ="]
STEP_TIMEOUT_S = 3.0


@pytest.mark.parametrize(
    ("device", "num_tokens", "notice_s"),
    [
        ("cpu", 200, STEP_TIMEOUT_S + 3.0),
        # A twin's kernels run, and wait, in the thread that launches them: their deadline comes before the header's.
        pytest.param("twin", 60, 2 * STEP_TIMEOUT_S + 3.0, marks=pytest.mark.slow),
    ],
)
def test_deaths_and_hangs_change_no_token(device: str, num_tokens: int, notice_s: float) -> None:
    """One cluster, four rounds: undisturbed, a rank killed, a rank stopped, both ranks killed."""

    async def round_of(cluster: Cluster, blow: signal.Signals | None, victims: tuple[int, ...]) -> dict[int, list[int]]:
        collector = submit(cluster, PROMPTS, max_tokens=num_tokens, ignore_eos=True)
        if blow is not None:
            await collector.until(lambda: len(collector.token_ids) == len(PROMPTS))  # all are under way, two a rank
            pids = [rank_pids(cluster)[rank] for rank in victims]
            num_carried = cluster.core.num_carried
            for pid in pids:
                os.kill(pid, blow)
            await until(lambda: not cluster.ready, notice_s)
            await until(lambda: cluster.ready, 30)
            assert cluster.core.num_carried == num_carried + 2 * len(victims)
            assert not any(psutil.pid_exists(pid) for pid in pids)
        finishes = await collector.all_finished(len(PROMPTS), 60)
        assert [(finish.reason, finish.num_output_tokens) for finish in finishes] == [("length", num_tokens)] * 4
        return collector.token_ids

    async def scenario(cluster: Cluster) -> None:
        whole = await round_of(cluster, None, ())
        for blow, victims in ((signal.SIGKILL, (1,)), (signal.SIGSTOP, (1,)), (signal.SIGKILL, (0, 1))):
            assert await round_of(cluster, blow, victims) == whole, (blow.name, victims)
        assert cluster.controller.descriptor.generation == 4

    play(real("local", step_timeout_s=STEP_TIMEOUT_S, device=device), scenario, timeout_s=200)


def test_work_that_is_gone_when_it_arrives_leaves_a_parked_cluster_whole() -> None:
    """The target of a Submit may have nothing to do: aborted in the same breath, or refused. The others must not wait."""

    async def scenario(cluster: Cluster) -> None:
        too_long = [5] * 400  # over the step's budget, which without chunked prefill only the rank can say
        for _ in range(4):
            await until(lambda: all(rank.parked_step is not None for rank in cluster.controller._ranks.members), 10)
            request = cluster.core.submit([[5] * 20], SamplingParams(max_tokens=200), sink=lambda _: None)
            await asyncio.sleep(0)
            cluster.core.abort(request.request_id)
            await until(lambda: all(rank.parked_step is not None for rank in cluster.controller._ranks.members), 10)
            (finish,) = await submit(cluster, [too_long], max_tokens=4).all_finished(1)
            assert finish.reason == "error"
        await submit(cluster, PROMPTS, max_tokens=8).all_finished(len(PROMPTS))
        assert cluster.controller.descriptor.generation == 1

    settings = {"enable_chunked_prefill": False, "max_num_batched_tokens": 300, "step_timeout_s": STEP_TIMEOUT_S}
    play(real("local", **settings), scenario)


def test_the_end_of_a_dead_ranks_link_is_not_its_replacements() -> None:
    """The loop is busy while a rank dies, so its end of file and its exit are seen in one turn."""

    async def scenario(cluster: Cluster) -> None:
        for generation in (2, 3):
            os.kill(rank_pids(cluster)[1], signal.SIGKILL)
            time.sleep(0.1)
            await until(lambda: not cluster.ready, 10)
            await until(lambda: cluster.ready, 60)
            assert cluster.controller.descriptor.generation == generation
        assert len(cluster.controller._budget.setbacks) == 2

    play(real("local"), scenario)


def test_start_errors_are_the_ranks_own(tmp_path: Path) -> None:
    """What only a rank can see: a truncated file, a setting that the kernels refuse."""
    broken = tmp_path / "model"
    broken.mkdir()
    for path in bundled_model().iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    data = (bundled_model() / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])

    async def run(error: type[Exception], match: str, **settings: object) -> None:
        before = Leavings.now()
        with pytest.raises(error, match=match):
            await asyncio.wait_for(real("local", **settings).start(), 30)
        before.check()

    asyncio.run(run(CheckpointError, r"model\.safetensors", model=str(broken)))
    asyncio.run(run(ConfigError, "block_size=24", block_size=24))


def test_an_idle_cluster_is_idle() -> None:
    async def scenario(cluster: Cluster) -> None:
        await submit(cluster, PROMPTS * 2, max_tokens=8).all_finished(2 * len(PROMPTS))
        assert await idle_percent(cluster, 3) < 2.0

    play(real("local", ranks=4), scenario)


OWNER = """
import asyncio, sys
sys.path.insert(0, {here!r})
from cluster_rig import rank_pids, real

async def main():
    cluster = real("local")
    await cluster.start()
    print(*rank_pids(cluster), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_server_that_is_killed_takes_its_ranks_along() -> None:
    before = Leavings.now()
    script = OWNER.format(here=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.kill()
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before.check()
