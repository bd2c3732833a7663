"""`switchgear collect-env`: what a bug report needs, and nothing private."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil

from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.cuda.report import gpu_report

PACKAGES = ("switchgear", "torch", "ray", "numpy", "msgpack", "msgspec", "tokenizers", "safetensors", "starlette", "uvicorn", "httpx",
            "mpi4py")  # fmt: skip


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _native() -> str:
    from switchgear_runtime import ops

    try:
        return f"kernels {ops.kernel_version()}, instruction set {ops.instruction_set()}"
    except (OSError, RuntimeError) as error:
        return f"not usable: {error}"


def report() -> str:
    """The report, `name: value` a line."""
    memory = psutil.virtual_memory()
    shm = os.statvfs("/dev/shm")
    lines = {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "processor": processor(),
        "cores": f"{os.cpu_count()} ({len(os.sched_getaffinity(0))} usable)",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free",
        "/dev/shm": f"{shm.f_blocks * shm.f_frsize / 2**30:.1f} GiB, {shm.f_bavail * shm.f_frsize / 2**30:.1f} free",
        "native": _native(),
    }
    lines |= gpu_report(gather_facts())
    lines |= {name: _package(name) for name in PACKAGES}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def processor() -> str:
    """The processor's name as the kernel gives it."""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:  # noqa: PTH123 - a device, not a path of ours
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
