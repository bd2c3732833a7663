"""What a machine has for `--device cuda`: `GpuFacts`, gathered without importing torch, CuPy or NCCL.

Only the driver's own library is opened, and asked for its version and its GPUs; no CUDA context is made. Everything else
is read from what lies on disk: torch's version file, the records of installed packages, the built library.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from switchgear_runtime.comm.nccl_library import NCCL_PACKAGES, installed, library_path, recorded_bytes
from switchgear_runtime.env import visible_cuda_devices

CUPY_PACKAGES = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
_KERNELS = Path(__file__).parent.parent / "_native" / "libswitchgear_cuda.so"
_DRIVER_FILE = "libcuda.so.1"
_MODULE = Path("/proc/driver/nvidia/version")
_NAME_BYTES = 128
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device that the driver shows this process."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """An installed package that is built for one CUDA."""

    name: str
    version: str
    library_bytes: int | None = None  # of libnccl.so.2, as the package's own record has it

    @property
    def cuda_major(self) -> int:
        """By its name: nvidia-nccl-cu13, cupy-cuda12x."""
        digits = "".join(character for character in self.name.rsplit("-", 1)[1] if character.isdigit())
        return int(digits)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """All of it. None: not there."""

    kernel_module: str | None  # the driver's version in the kernel
    driver_cuda: int | None  # the newest CUDA the driver speaks, 13000 for 13.0; None: no libcuda.so.1
    driver_error: int  # what the driver's start returned (CUresult)
    gpus: tuple[Gpu, ...]
    hidden: str | None  # CUDA_VISIBLE_DEVICES, where it is set
    torch_version: str | None
    torch_cuda: str | None  # the CUDA that torch is built for, "13.0"; None: for the CPU
    nccl: tuple[Package, ...]
    nccl_library: Path | None
    nccl_library_bytes: int | None
    cupy: tuple[Package, ...]
    kernels: Path | None  # our CUDA library


def gather_facts() -> GpuFacts:
    """Of this machine and this Python."""
    cuda, error, gpus = _ask_driver()
    torch_version, torch_cuda = _torch_build()
    nccl = [(name, found) for name in NCCL_PACKAGES if (found := installed(name)) is not None]
    library = next((path for _, found in nccl if (path := library_path(found)) is not None), None)
    kernels = _KERNELS
    return GpuFacts(
        kernel_module=_kernel_module(),
        driver_cuda=cuda,
        driver_error=error,
        gpus=gpus,
        hidden=visible_cuda_devices(),
        torch_version=torch_version,
        torch_cuda=torch_cuda,
        nccl=tuple(
            Package(name=name, version=found.version, library_bytes=recorded_bytes(found)) for name, found in nccl
        ),
        nccl_library=library,
        nccl_library_bytes=None if library is None else library.stat().st_size,
        cupy=tuple(
            Package(name=name, version=found.version)
            for name in CUPY_PACKAGES
            if (found := installed(name)) is not None
        ),
        kernels=kernels if kernels.is_file() else None,
    )


def _ask_driver() -> tuple[int | None, int, tuple[Gpu, ...]]:
    """(newest CUDA, status of its start, GPUs)."""
    try:
        driver = ctypes.CDLL(_DRIVER_FILE)
    except OSError:
        return None, 0, ()
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = number.value
    status = driver.cuInit(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(number))
    if status:
        return version, int(status), ()
    return version, 0, tuple(_gpu(driver, index) for index in range(number.value))


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(
        name=name.value.decode(errors="replace"), capability=(major.value, minor.value), memory_bytes=memory.value
    )


def _kernel_module() -> str | None:
    """`NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ...` -> 580.95.05"""
    try:
        first = _MODULE.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), first)


def _torch_build() -> tuple[str | None, str | None]:
    """(version, CUDA) from torch/version.py, which holds nothing but assignments."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None, None
    values: dict[str, object] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    version, cuda = values.get("__version__"), values.get("cuda")
    return None if version is None else str(version), None if cuda is None else str(cuda)
