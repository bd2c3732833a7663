"""What ptxas makes of kernels whose speed hangs on registers: nothing spilled, and as many blocks side by side as meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
REGISTERS = 65536  # of a multiprocessor, in each of the architectures
FILES = ("attention.cu", "router.cu", "rows.cu", "qkv.cu", "sampler.cu", "peer.cu", "payload.cu")
BLOCKS = {  # of a kernel on a multiprocessor, at least; not named: 1
    "AttendTokensILi64": 3,
    "AttendTokensILi128": 3,
    "AttendTokensILi256": 2,
    "AttendTileILi64": 2,
    "AttendTileILi128": 2,
    "AttendTileILi256": 2,
    "TopkRouterILi8": 4,
    "RotateQkv": 4,
    "RmsNormILi256": 4,
    "SampleRow": 2,
}
THREADS = {"RmsNormILi256": 256, "RmsNormILi1024": 1024, "SampleRow": 512}  # others: 128


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.parametrize(
    "architecture", ["90a", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_nothing_is_spilled(tmp_path: Path, architecture: str) -> None:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-O3", "-fmad=false", "-gencode", target, "-Xptxas", "-v", "-I", str(CSRC)]
    seen: dict[str, int] = {}
    for file in FILES:
        command = [compiler, *options, "-cubin", str(CSRC / "cuda" / file), "-o", str(tmp_path / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        if "Unsupported gpu architecture" in done.stderr:
            pytest.skip(f"this nvcc has no sm_{architecture}")
        assert done.returncode == 0, done.stderr
        for entry in done.stderr.split("Compiling entry function")[1:]:
            name = entry.split("'")[1]
            assert ", 0 bytes spill stores, 0 bytes spill loads" in entry, f"{name}: {entry}"
            registers = re.search(r"Used (\d+) registers", entry)
            assert registers is not None
            seen[name] = int(registers[1])
    for part, blocks in BLOCKS.items():
        (name,) = (name for name in seen if part + "E" in name)
        assert blocks * seen[name] * THREADS.get(part, 128) <= REGISTERS, f"{name}: {seen[name]} registers"
