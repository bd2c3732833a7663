"""`switchgear placement load-expert` on a real server, under an open stream; then kill -9 of that server in mid-migration.

A new server starts on the checkpoint, with a whole map.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from expert_swaps import write_expert
from served_process import start_server, stop_server

from switchgear import AsyncClient, SamplingParams
from switchgear.admin_client import AdminClient
from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear_runtime.errors import SwitchgearError
from switchgear_runtime.moe.expert_map import ExpertMap

pytestmark = pytest.mark.ranks
FLAGS = ("--ranks", "2", "--admin-key", "secret", "--placement", "static", "--migration-bytes-per-s", "200000")
PROMPT = [5, 6, 7]
PARAMS = SamplingParams(max_tokens=300, ignore_eos=True, seed=7)
NUM_LAYERS, NUM_EXPERTS = 4, 32  # of the bundled model


async def stream(url: str, meanwhile: list[str] | None = None) -> list[int]:
    """The tokens; once the first is there, a command of the user's."""
    token_ids: list[int] = []
    async with AsyncClient(url) as client:
        async for delta in client.stream(PROMPT, PARAMS):
            token_ids += delta.token_ids
            if meanwhile is not None:
                command, meanwhile = meanwhile, None
                assert await asyncio.to_thread(main, command) == 0
    return token_ids


def tokens(url: str, meanwhile: list[str] | None = None) -> list[int]:
    return asyncio.run(asyncio.wait_for(stream(url, meanwhile), 60))


def ranks_of(server: int) -> list[psutil.Process]:
    children = psutil.Process(server).children(recursive=True)
    return [child for child in children if "rank_worker" in " ".join(child.cmdline())]


def kill_in_the_middle_of_a_migration(server: subprocess.Popen[str], url: str) -> None:
    """At the budget that FLAGS gives, this one takes many seconds."""
    wanted = ExpertMap.random(np.random.default_rng(3), NUM_LAYERS, NUM_EXPERTS, 2, num_redundant=4)

    def order() -> None:
        with suppress(SwitchgearError), AdminClient(url, "secret") as client:
            client.apply(wanted.to_json())

    thread = threading.Thread(target=order)
    thread.start()
    with AdminClient(url, "secret") as client:
        deadline = time.monotonic() + 30
        while (moving := client.placement().migration) is None or not moving.experts:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    server.kill()
    assert server.wait(30) == -signal.SIGKILL
    thread.join(30)
    assert not thread.is_alive()


def test_an_open_stream_keeps_its_weights_and_a_killed_server_leaves_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, layer, expert = tmp_path / "tuned.safetensors", 1, 9
    write_expert(path, bundled_model(), layer=layer, expert=expert, seed=4)
    process, url = start_server(*FLAGS)
    try:
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        server = ["--url", url, "--admin-key", "secret"]
        place = ["--layer", str(layer), "--expert", str(expert)]
        old = tokens(url)
        assert tokens(url, ["placement", "load-expert", str(path), *place, *server]) == old
        assert "model version 1 is in force" in capsys.readouterr().out
        assert tokens(url) != old
        assert main(["placement", "show", *server]) == 0
        assert f"version 1: layer {layer} expert {expert} from {path}" in capsys.readouterr().out
        assert main(["placement", "load-expert", str(tmp_path / "none"), *place, *server]) == 2
        assert "No such file" in capsys.readouterr().err
        kill_in_the_middle_of_a_migration(process, url)
    finally:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive, "a rank outlived its server"

    process, url = start_server(*FLAGS)
    try:
        with AdminClient(url, "secret") as client:
            status = client.placement()
        assert status.expert_map is not None
        assert ExpertMap.from_json(status.expert_map) == ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2)
        assert (status.epoch, status.model_version, status.migration) == (0, 0, None)
        assert tokens(url) == old
    finally:
        assert stop_server(process) == 0
