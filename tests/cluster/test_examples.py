"""Each program in examples/ runs as its docstring says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ranks
def test_embedded_llm() -> None:
    assert run("embedded_llm.py").count("->") == 3


@pytest.mark.ranks
def test_batch_client(server_url: str) -> None:
    assert len(run("batch_client.py", server_url).splitlines()) == 32


@pytest.mark.ranks
def test_streaming_client(server_url: str) -> None:
    assert run("streaming_client.py", server_url, "The king said").startswith("The king said")


def test_no_example_is_forgotten() -> None:
    tested = {"embedded_llm.py", "batch_client.py", "streaming_client.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
