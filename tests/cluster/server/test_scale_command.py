"""`switchgear scale` on a real server: ranks come and go under open streams, the order's errors, its key."""

from __future__ import annotations

import asyncio

import httpx
import psutil
import pytest
from served_process import start_server, stop_server

from switchgear import AsyncClient, SamplingParams
from switchgear.cli import main

pytestmark = pytest.mark.ranks
PARAMS = SamplingParams(max_tokens=400, ignore_eos=True, seed=7)


def num_rank_processes(server: int) -> int:
    children = psutil.Process(server).children(recursive=True)
    return sum("rank_worker" in " ".join(child.cmdline()) for child in children)


async def stream(url: str, prompts: list[list[int]], meanwhile: list[str] | None = None) -> list[list[int]]:
    """The tokens of each prompt; once all have begun, a command of the user's."""
    async with AsyncClient(url) as client:
        begun: set[int] = set()

        async def one(index: int) -> list[int]:
            token_ids: list[int] = []
            async for delta in client.stream(prompts[index], PARAMS):
                begun.add(index)
                token_ids += delta.token_ids
            return token_ids

        tasks = [asyncio.create_task(one(index)) for index in range(len(prompts))]
        if meanwhile is not None:
            async with asyncio.timeout(30):
                while len(begun) < len(prompts):
                    await asyncio.sleep(0.01)
            assert await asyncio.to_thread(main, meanwhile) == 0
        return await asyncio.gather(*tasks)


def test_a_server_grows_and_shrinks_under_open_streams(capsys: pytest.CaptureFixture[str]) -> None:
    process, url = start_server("--ranks", "1", "--admin-key", "secret")
    prompts = [[5, i] for i in range(6)]
    try:
        whole = asyncio.run(asyncio.wait_for(stream(url, prompts), 60))
        for num_ranks, generation in ((2, 2), (1, 3)):
            command = ["scale", "--ranks", str(num_ranks), "--url", url, "--admin-key", "secret"]
            assert asyncio.run(asyncio.wait_for(stream(url, prompts, command), 60)) == whole
            assert f"{num_ranks} ranks serve, in generation {generation};" in capsys.readouterr().out
            assert httpx.get(f"{url}/ready", trust_env=False).json()["ranks"] == num_ranks
            assert num_rank_processes(process.pid) == num_ranks
        assert main(["scale", "--ranks", "65", "--url", url, "--admin-key", "secret"]) == 2
        assert "ranks=65 must be from 1 to 64" in capsys.readouterr().err
        assert main(["scale", "--ranks", "2", "--url", url, "--admin-key", "wrong"]) == 2
        assert "wrong admin key" in capsys.readouterr().err
        key = {"Authorization": "Bearer secret"}
        for body in ({"ranks": "two"}, {"ranks": 2, "rank": 3}, [2]):
            answer = httpx.post(f"{url}/admin/scale", json=body, headers=key, trust_env=False)
            assert answer.status_code == 400, answer.text
        assert num_rank_processes(process.pid) == 1
    finally:
        assert stop_server(process) == 0
