"""Why `--device cuda` cannot run: each obstacle over the facts of a made-up machine, and what this machine says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.facts import Gpu, GpuFacts, Package, gather_facts
from switchgear_runtime.cuda.preflight import (
    DRIVER_FOR_CUDA,
    TORCH_INDEX,
    DeviceUnavailable,
    Obstacle,
    device_obstacles,
    needs_nccl,
    obstacles,
    require_gpu,
)
from switchgear_runtime.cuda.report import gpu_report
from switchgear_runtime.errors import ConfigError

H200 = Gpu(name="NVIDIA H200", capability=(9, 0), memory_bytes=141 << 30)
NCCL12 = Package(name="nvidia-nccl-cu12", version="2.29.7", library_bytes=300_000_000)
NCCL13 = Package(name="nvidia-nccl-cu13", version="2.29.7", library_bytes=310_000_000)
CUPY12 = Package(name="cupy-cuda12x", version="14.2.0")
CUPY13 = Package(name="cupy-cuda13x", version="14.2.0")
GOOD = GpuFacts(
    kernel_module="580.95.05",
    driver_cuda=13000,
    driver_error=0,
    gpus=(H200,),
    hidden=None,
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
    nccl=(NCCL13,),
    nccl_library=Path("/site/nvidia/nccl/lib/libnccl.so.2"),
    nccl_library_bytes=310_000_000,
    cupy=(CUPY13,),
    kernels=Path("/site/switchgear_runtime/_native/libswitchgear_cuda.so"),
)
CUDA12 = {
    "torch_version": "2.13.0+cu128",
    "torch_cuda": "12.8",
    "nccl": (NCCL12,),
    "nccl_library_bytes": 300_000_000,
    "cupy": (CUPY12,),
}
NO_DRIVER = {"kernel_module": None, "driver_cuda": None, "gpus": ()}


def found(**changes: Any) -> list[Obstacle]:
    return obstacles(replace(GOOD, **changes), nccl=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        CUDA12,
        {**CUDA12, "driver_cuda": 12040},  # an older minor version of the same CUDA will do
        {"cupy": ()},
        {"gpus": (Gpu(name="A100", capability=(8, 0), memory_bytes=80 << 30),)},
        {"gpus": (Gpu(name="RTX 5090", capability=(12, 0), memory_bytes=32 << 30),)},
        {"gpus": (Gpu(name="B200", capability=(10, 0), memory_bytes=180 << 30),)},
    ],
)
def test_a_machine_that_has_all(changes: dict[str, Any]) -> None:
    assert found(**changes) == []
    assert gpu_report(replace(GOOD, **changes))["device cuda"] == "usable"


def test_what_stops_everything_is_the_drivers_or_torchs() -> None:
    for changes in ({"cupy": (CUPY12,)}, {"nccl": (NCCL12,)}, {"kernels": None}):
        assert found(**changes)
        assert device_obstacles(replace(GOOD, **changes), built=False) == []
    assert len(device_obstacles(replace(GOOD, kernels=None))) == 1
    assert device_obstacles(replace(GOOD, **NO_DRIVER))
    assert device_obstacles(replace(GOOD, torch_cuda=None))


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        (NO_DRIVER, "no NVIDIA driver", "device='cpu'"),
        ({**NO_DRIVER, "kernel_module": "580.95.05"}, "libcuda.so.1 is not found", "--gpus all"),
        ({"gpus": ()}, "shows no GPU", "nvidia-smi -L"),
        ({"gpus": (), "driver_error": 100}, "shows no GPU", "--gpus all"),
        ({"gpus": (), "driver_error": 100, "hidden": ""}, "CUDA_VISIBLE_DEVICES=''", "unset it"),
        ({"gpus": (), "driver_error": 800}, "refuses this process", "/dev/nvidia*"),
        ({"gpus": (), "driver_error": 803}, "do not go together (CUDA error 803)", "reboot"),
        ({"gpus": (), "driver_error": 999}, "CUDA error 999", "dmesg"),
        (
            {"gpus": (Gpu(name="T4", capability=(7, 5), memory_bytes=16 << 30),)},
            "no kernels for T4 (7.5)",
            "8.0 or later",
        ),
        ({"torch_version": None, "torch_cuda": None}, "torch is not installed", "whl/cu130"),
        ({"torch_version": "2.13.0+cpu", "torch_cuda": None}, "torch 2.13.0+cpu is built for the CPU", "whl/cu130"),
        (
            {"torch_version": "2.13.0+cpu", "torch_cuda": None, "driver_cuda": 12080},
            "torch 2.13.0+cpu is built for the CPU",
            "whl/cu128",
        ),
        ({"driver_cuda": 12080}, "built for CUDA 13.0, and the driver speaks 12.8", "update the driver to 580.65.06"),
        ({"driver_cuda": 12080}, "built for CUDA 13.0, and the driver speaks 12.8", "switchgear[cu12]"),
        ({"kernels": None}, "libswitchgear_cuda.so, our kernels, is not built", "cuda-toolkit[nvcc,cudart,cccl]==13.*"),
        ({**CUDA12, "kernels": None}, "is not built", "(a CUDA 12 toolkit), by `make cuda`"),
        ({"nccl": (), "nccl_library": None}, "NCCL is not installed", "switchgear[cu13]"),
        ({"nccl": (NCCL12, NCCL13)}, "installed twice", "uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13"),
        (
            {"nccl": (NCCL12,), "nccl_library_bytes": 300_000_000},
            "nvidia-nccl-cu12 2.29.7 is for CUDA 12, and torch is built for 13.0",
            "switchgear[cu13]",
        ),
        ({**CUDA12, "nccl": (NCCL13,), "nccl_library_bytes": 310_000_000}, "is for CUDA 13", "switchgear[cu12]"),
        ({"nccl_library_bytes": 300_000_000}, "another package has overwritten it", "--force-reinstall"),
        ({"nccl_library": None}, "has no libnccl.so.2", "nvidia-nccl-cu13==2.29.7"),
        ({"cupy": (CUPY12, CUPY13)}, "CuPy is installed twice", "uninstall -y cupy-cuda12x cupy-cuda13x"),
        ({"cupy": (CUPY12,)}, "cupy-cuda12x 14.2.0 is for CUDA 12", "uninstall -y cupy-cuda12x"),
    ],
)
def test_each_obstacle_names_itself_and_its_fix(changes: dict[str, Any], what: str, fix: str) -> None:
    (obstacle,) = found(**changes)
    assert what in obstacle.what
    assert fix in obstacle.fix
    assert gpu_report(replace(GOOD, **changes))["device cuda"].startswith(
        "usable" if what == "NCCL is not installed" else "not usable: "
    )


def test_all_obstacles_at_once_in_the_order_of_removal() -> None:
    everything = replace(
        GOOD, **NO_DRIVER, torch_version="2.13.0+cpu", torch_cuda=None, kernels=None, nccl=(), nccl_library=None
    )
    texts = [obstacle.what for obstacle in obstacles(everything, nccl=True)]
    for text, word in zip(texts, ("driver", "torch", "libswitchgear_cuda.so", "NCCL"), strict=True):
        assert word in text
    error = DeviceUnavailable(obstacles(everything, nccl=False))
    assert isinstance(error, ConfigError)
    assert "  3. libswitchgear_cuda.so" in str(error)
    assert "NCCL" not in str(error)


@pytest.mark.parametrize(
    ("num_ranks", "transport", "num_gpus", "needed"),
    [(1, "nccl", 1, False), (2, "nccl", 1, True), (2, "auto", 2, True), (2, "auto", 1, False), (4, "shm", 4, False)],
)
def test_when_nccl_is_needed(num_ranks: int, transport: str, num_gpus: int, needed: bool) -> None:
    facts = replace(GOOD, gpus=(H200,) * num_gpus)
    assert needs_nccl(facts, num_ranks=num_ranks, transport=transport) is needed


def test_the_facts_of_this_machine_without_loading_torch() -> None:
    code = (
        "import sys; from switchgear_runtime.cuda.facts import gather_facts; facts = gather_facts(); "
        "print(facts.torch_version, [m for m in ('torch', 'cupy', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    import torch

    assert done.stdout.strip() == f"{torch.__version__} []"
    assert gather_facts().torch_cuda == torch.version.cuda


@pytest.mark.skipif(bool(gather_facts().gpus), reason="this machine has a GPU")
def test_serve_says_what_is_missing() -> None:
    with pytest.raises(DeviceUnavailable, match="device='cuda' cannot run here") as caught:
        require_gpu(num_ranks=1, transport="auto")
    command = [sys.executable, "-m", "switchgear.cli", "serve", "--device", "cuda", "--launcher", "local"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for obstacle in caught.value.obstacles:
        assert str(obstacle) in done.stderr


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"device": "tpu"}, "cpu, cuda, twin"),
        ({"device": "cpu", "transport": "nccl"}, "use device='cuda'"),
        ({"device": "cuda", "quantization": "int8"}, "device='cpu' only"),
        ({"device": "twin", "routing_log": "x"}, "device='cpu' only"),
        ({"device": "cuda", "dtype": "float32"}, "bfloat16"),
        ({"device": "cpu", "dispatch": "hierarchical"}, "dispatch='hierarchical' needs device=cuda or twin"),
        ({"device": "twin", "dispatch": "deepep"}, "dispatch='deepep' needs device=cuda, not 'twin'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        EngineConfig(**changes)


def test_the_two_extras_are_apart_and_documented() -> None:
    """cu12 and cu13 name packages of one CUDA each, exclude each other, and are what the fixes and docs/GPU.md say."""
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    guide = (root / "docs" / "GPU.md").read_text(encoding="utf-8")
    for major, nccl, cupy in ((12, NCCL12, CUPY12), (13, NCCL13, CUPY13)):
        packages = [
            re.split(r"[<>=]", wanted)[0] for wanted in project["project"]["optional-dependencies"][f"cu{major}"]
        ]
        assert packages == [nccl.name, cupy.name]
        assert {nccl.cuda_major, cupy.cuda_major} == {major}
        assert f"pip install 'switchgear[cu{major}]'" in guide
        assert DRIVER_FOR_CUDA[major] in guide
        assert TORCH_INDEX[major] in guide
    (pair,) = project["tool"]["uv"]["conflicts"]
    assert {part["extra"] for part in pair} == {"cu12", "cu13"}
