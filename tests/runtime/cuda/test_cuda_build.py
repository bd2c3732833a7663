"""The device kernels' library for GPUs: built here, it loads without a GPU, and says so instead of crashing; mutants."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError, device_library, library_path

ROOT = Path(__file__).parents[3]


def functions_of_the_header() -> set[str]:
    header = (ROOT / "csrc" / "cuda" / "abi.h").read_text(encoding="utf-8")
    return set(re.findall(r"^SG_API [\w* ]*?(sg_cuda_\w+)\(", header, re.MULTILINE))


def test_the_twin_has_every_function() -> None:
    names = functions_of_the_header()
    assert len(names) > 20
    for name in names:
        getattr(device_library("twin"), name)


def test_the_gpu_library_loads_without_a_gpu() -> None:
    if not library_path("cuda").is_file():
        pytest.skip("no libswitchgear_cuda.so; `make cuda` builds it where there is an nvcc")
    library, twin = device_library("cuda"), device_library("twin")
    for name in functions_of_the_header():
        getattr(library, name)
    assert library.sg_cuda_kind() == b"cuda"
    assert library.sg_cuda_architectures().split()[:2] == [b"80", b"90a"]
    assert library.sg_cuda_kernel_version() == twin.sg_cuda_kernel_version()
    if library.sg_cuda_num_devices() == 0:
        sizes = structs.Router(num_tokens=1, num_experts=8, top_k=2, num_groups=1, top_k_groups=1)
        with pytest.raises(DeviceError, match=r"topk_router: .* \(cudaError"):
            library.sg_cuda_topk_router(ctypes.byref(sizes), None)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    if nvcc() is None:
        pytest.skip("no nvcc")
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release"]
    said = subprocess.run(configure, check=True, capture_output=True, text=True, timeout=120).stdout
    build = ["cmake", "--build", str(tmp_path), "--target", "switchgear_cuda"]
    subprocess.run(build, check=True, capture_output=True, timeout=800)
    library = ctypes.CDLL(str(tmp_path / "libswitchgear_cuda.so"))
    library.sg_cuda_architectures.restype = ctypes.c_char_p
    found = library.sg_cuda_architectures()
    assert found == (b"80 90a" if "no code for sm_100" in said else b"80 90a 100")


def run_mutants(*arguments: str) -> None:
    command = [sys.executable, mutants.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build mutants with")
def test_some_mutants_are_noticed() -> None:
    """The same ones until the kernels change; all of them are among the slow tests."""
    run_mutants("--sample", "2", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(3700)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build mutants with")
@pytest.mark.parametrize("file", [*mutants.CHECKS, *mutants.HEADERS])
def test_all_mutants_are_noticed(file: str) -> None:
    run_mutants("--file", file)
