"""What ptxas says of the products: no register is spilled, the blocks that a multiprocessor should hold fit its registers,
and wgmma runs as it was written."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
REGISTERS = 65536  # of a multiprocessor, of every architecture here
ARCHITECTURES = {"80": "arch=compute_80,code=sm_80", "90a": "arch=compute_90a,code=sm_90a"}
THREADS = {  # of a block, by the kernel's template arguments; the last of these: blocks that a multiprocessor should hold
    "GemmMma": lambda arguments: 32 * arguments[3] * arguments[4],
    "GemmWgmma": lambda arguments: 128 * arguments[2],
    "GemmFp8": lambda arguments: 128 * arguments[3],
}
CASES = [("gemm_mma", "80", 7), ("gemm_mma", "90a", 7), ("gemm_wgmma", "90a", 6), ("gemm_fp8", "90a", 10)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "architecture", "num_kernels"), CASES)
def test_registers(tmp_path: Path, name: str, architecture: str, num_kernels: int) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [
        nvcc,
        "-gencode",
        ARCHITECTURES[architecture],
        "-std=c++17",
        "-fmad=false",
        "-Xptxas",
        "-v",
        "-I",
        str(CSRC),
    ]
    source = CSRC / "cuda" / f"{name}.cu"
    done = subprocess.run(
        [*command, "-cubin", str(source), "-o", str(tmp_path / "out.cubin")],
        capture_output=True,
        text=True,
        check=True,
        timeout=550,
    )
    said = done.stdout + done.stderr
    assert "warning" not in said.lower(), said
    assert "serialized" not in said, said
    found = re.findall(
        r"Compiling entry function '\w*?(Gemm[A-Z]\w+?)I((?:Li\d+E)+)E.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert len(found) == num_kernels, said
    for kernel, numbers, stores, loads, registers in found:
        arguments = [int(number) for number in re.findall(r"Li(\d+)E", numbers)]
        assert (int(stores), int(loads)) == (0, 0), f"{kernel}{arguments} spills"
        of_warp = -(-int(registers) // 8) * 8 * 32
        assert arguments[-1] * (THREADS[kernel](arguments) // 32) * of_warp <= REGISTERS, (
            f"{kernel}{arguments}: {registers} registers"
        )
