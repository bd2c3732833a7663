"""Each program in examples/ runs as its docstring says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_sites import mpi_site
from own_ray import OwnRay, free_port, ray_serve_python

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
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


@pytest.mark.ranks
def test_openai_client(server_url: str) -> None:
    pytest.importorskip("openai", reason="the openai package is not installed")
    first, second = run("openai_client.py", server_url).splitlines()[:2]
    assert "tokens, logprobs [-" in first
    assert second


@pytest.mark.ranks
def test_mpi_launch() -> None:
    site = mpi_site("mpich")
    assert run("mpi_launch.py", site.mpiexec, env=site.environment(os.environ)).count("->") == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_ray_job(own_ray: OwnRay) -> None:
    """On a Ray cluster of its own, whose head has the dashboard that takes jobs."""
    python = own_ray.use(ray_serve_python())
    port, dashboard = free_port(), free_port()
    own_ray.run(
        "ray", "start", "--head", f"--port={port}", "--num-cpus=2", f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
    )  # fmt: skip
    text = own_ray.run(python, str(EXAMPLES / "ray_job.py"), f"http://127.0.0.1:{dashboard}", "harbor (noun):")
    assert "harbor (noun): " in text


def test_no_example_is_forgotten() -> None:
    tested = {"embedded_llm.py", "batch_client.py", "streaming_client.py", "openai_client.py", "mpi_launch.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested | {"ray_job.py"}
