"""The kernels that only move rows, as they are compiled for Hopper: no spills, 16 bytes a load, all loads before the sums."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
FLAGS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-fmad=false", "-Xptxas=-v")


def compiled(source: str, folder: Path) -> tuple[Path, str]:
    """(object file, what ptxas said)."""
    target = folder / "kernel.o"
    command = [str(NVCC), *FLAGS, "-I", str(CSRC), "-c", str(CSRC / "cuda" / source), "-o", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=170)
    return target, done.stderr


def disassembler() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.is_file() else None
    return found


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["payload.cu", "combine.cu", "counters.cu"])
def test_nothing_is_spilled(source: str, tmp_path: Path) -> None:
    _, said = compiled(source, tmp_path)
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    assert spilled
    assert set(spilled) == {0}


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="no nvcc, or no cuobjdump")
def test_combine_starts_its_loads_before_it_sums(tmp_path: Path) -> None:
    """Eight of 16 bytes in a row for bf16 rows and top 8, where ptxas alone would let each wait for the last's sum."""
    target, _ = compiled("combine.cu", tmp_path)
    command = [str(disassembler()), "--dump-sass", str(target)]
    path = str(Path(str(disassembler())).parent)
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, env={"PATH": f"{path}:/usr/bin:/bin"}
    ).stdout
    (kernel,) = (part for part in said.split("Function : ")[1:] if "CombineRowsINS0_4bf16ELi8" in part.split("\n")[0])
    operations = re.findall(r"\b(LDG\.E\.128|FFMA|LDL|STL)\b", kernel)
    assert operations.index("FFMA") == 8
    assert set(operations[:8]) == {"LDG.E.128"}
    assert "LDL" not in operations
    assert "STL" not in operations
