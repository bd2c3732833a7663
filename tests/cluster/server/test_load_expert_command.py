"""`switchgear placement load-expert` on a real server: a stream that is open goes on, the next one has the new weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from expert_swaps import write_expert
from served_process import start_server, stop_server

from switchgear import AsyncClient, SamplingParams
from switchgear.cli import main
from switchgear.config import bundled_model

pytestmark = pytest.mark.ranks
PROMPT = [5, 6, 7]
PARAMS = SamplingParams(max_tokens=300, ignore_eos=True, seed=7)


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


def test_an_open_stream_keeps_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, layer, expert = tmp_path / "tuned.safetensors", 1, 9
    write_expert(path, bundled_model(), layer=layer, expert=expert, seed=4)
    process, url = start_server("--ranks", "2", "--admin-key", "secret", "--placement", "static")
    try:
        server = ["--url", url, "--admin-key", "secret"]
        place = ["--layer", str(layer), "--expert", str(expert)]
        old = asyncio.run(asyncio.wait_for(stream(url), 60))
        command = ["placement", "load-expert", str(path), *place, *server]
        assert asyncio.run(asyncio.wait_for(stream(url, command), 60)) == old
        assert "model version 1 is in force" in capsys.readouterr().out
        assert asyncio.run(asyncio.wait_for(stream(url), 60)) != old
        assert main(["placement", "show", *server]) == 0
        assert f"version 1: layer {layer} expert {expert} from {path}" in capsys.readouterr().out
        assert main(["placement", "load-expert", str(tmp_path / "none"), *place, *server]) == 2
        assert "No such file" in capsys.readouterr().err
    finally:
        assert stop_server(process) == 0
