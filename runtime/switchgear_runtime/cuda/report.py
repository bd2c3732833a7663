"""What `switchgear collect-env` says of GPUs: `gpu_report`, and why `--device cuda` would or would not run."""

from __future__ import annotations

from switchgear_runtime.cuda.facts import GpuFacts, Package
from switchgear_runtime.cuda.preflight import obstacles


def gpu_report(facts: GpuFacts) -> dict[str, str]:
    """Lines, by name."""
    found = obstacles(facts, nccl=False)
    return {
        "driver": _driver(facts),
        "GPUs": "; ".join(_gpus(facts)) or "none",
        "torch's CUDA": facts.torch_cuda or "none (built for the CPU)",
        "NCCL": _packages(facts.nccl),
        "CuPy": _packages(facts.cupy),
        "CUDA kernels": "built" if facts.kernels is not None else "not built",
        "device cuda": "usable" if not found else f"not usable: {found[0].what}",
    }


def _driver(facts: GpuFacts) -> str:
    if facts.driver_cuda is None:
        return "none" if facts.kernel_module is None else f"{facts.kernel_module}, without libcuda.so.1"
    speaks = f"CUDA {facts.driver_cuda // 1000}.{facts.driver_cuda % 1000 // 10}"
    return f"{facts.kernel_module or 'version unknown'}, speaks {speaks}" + (
        f", does not start (error {facts.driver_error})" if facts.driver_error else ""
    )


def _gpus(facts: GpuFacts) -> list[str]:
    return [
        f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_bytes / 2**30:.0f} GiB"
        for gpu in facts.gpus
    ]


def _packages(packages: tuple[Package, ...]) -> str:
    return ", ".join(f"{package.name} {package.version}" for package in packages) or "not installed"
