"""`bench gpu` and the GPU suite, where there is no GPU: the same code through the twin, and a refusal that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear_runtime.cuda.facts import gather_facts

ROOT = Path(__file__).parents[2]
has_gpu = bool(gather_facts().gpus)


def test_rows_through_the_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each subject is checked against torch before it is timed; a kernel that did nothing would fail."""
    path = tmp_path / "rows.json"
    assert main(["bench", "gpu", "--device", "twin", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {row["kernel"] for row in written["rows"]} == {"dispatch", "combine", "experts", "decode"}
    assert all(row["device"] == "twin" and row["time_us"] > 0 < row["bound_us"] for row in written["rows"])
    assert written["machine"]["GPUs"] == "none" or has_gpu
    assert "decode" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_without_a_gpu_both_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    assert "device='cuda' cannot run here" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "The GPU suite cannot run here" in done.stderr
    assert "device cuda" in done.stdout
