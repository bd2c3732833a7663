"""kill -9 of the server in the middle of a migration: its ranks end, and a new server starts on a whole map."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from served_process import start_server, stop_server

from switchgear import Client, SamplingParams
from switchgear.admin_client import AdminClient
from switchgear_runtime.errors import SwitchgearError
from switchgear_runtime.moe.expert_map import ExpertMap

pytestmark = pytest.mark.ranks
FLAGS = ("--ranks", "2", "--admin-key", "secret", "--placement", "static", "--migration-bytes-per-s", "200000")
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
PROMPTS = ["The sun rises in the", "def fibonacci(n):"]
NUM_LAYERS, NUM_EXPERTS = 4, 32  # of the bundled model


def answers(url: str) -> list[list[int]]:
    with Client(url) as client:
        return [list(output.outputs[0].token_ids) for output in client.generate(PROMPTS, PARAMS, use_tqdm=False)]


def ranks_of(server: int) -> list[psutil.Process]:
    children = psutil.Process(server).children(recursive=True)
    return [child for child in children if "rank_worker" in " ".join(child.cmdline())]


def test_a_server_killed_in_the_middle_of_a_migration() -> None:
    rng = np.random.default_rng(3)
    wanted = ExpertMap.random(rng, NUM_LAYERS, NUM_EXPERTS, 2, num_redundant=4)
    process, url = start_server(*FLAGS)
    try:
        whole = answers(url)
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2

        def order() -> None:
            with suppress(SwitchgearError), AdminClient(url, "secret") as client:
                client.apply(wanted.to_json())

        thread = threading.Thread(target=order)
        thread.start()
        with AdminClient(url, "secret") as client:
            deadline = time.monotonic() + 30
            while (moving := client.placement().migration) is None or moving.epoch < 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert client.placement().state == "migrating"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()
    thread.join(30)
    assert not thread.is_alive()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive, "a rank outlived its server"

    process, url = start_server(*FLAGS)
    try:
        with AdminClient(url, "secret") as client:
            status = client.placement()
        assert status.expert_map is not None
        assert ExpertMap.from_json(status.expert_map) == ExpertMap.contiguous(NUM_LAYERS, NUM_EXPERTS, 2)
        assert (status.epoch, status.model_version, status.migration) == (0, 0, None)
        assert answers(url) == whole
    finally:
        assert stop_server(process) == 0
