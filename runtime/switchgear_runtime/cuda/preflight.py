"""Why `--device cuda` cannot run here, and what to do about it: `obstacles`, pure, over the facts of a machine.

Each obstacle names what was found and the fix. `require_gpu` gathers the facts and raises all obstacles at once, before
a model, torch or NCCL is loaded; a machine that passes has everything the device engine loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from switchgear_runtime.comm.nccl_library import NCCL_FILE
from switchgear_runtime.cuda.facts import GpuFacts, Package, gather_facts
from switchgear_runtime.errors import ConfigError

CAPABILITY_MIN = (8, 0)  # bf16 products; GPUs without code of their own take sm_80's as PTX
DRIVER_FOR_CUDA = {12: "525.60.13", 13: "580.65.06"}  # the oldest Linux driver of each CUDA (NVIDIA's release notes)
TORCH_INDEX = {12: "cu128", 13: "cu130"}  # of download.pytorch.org/whl
_DISPATCH_LIBRARIES = {
    "deepep": ("deep_ep", "build DeepEP 2 (github.com/deepseek-ai/DeepEP), or use dispatch='auto'"),
    "nccl-ep": ("nccl.ep", "`pip install 'nccl-extensions[cu13]'` (or [cu12]), or use dispatch='auto'"),
}
_NO_DEVICE, _NOT_PERMITTED, _MISMATCH, _COMPAT = 100, 800, 803, 804  # CUresult


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason, and how to get past it."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class DeviceUnavailable(ConfigError):
    """device='cuda' was asked for, and this machine or installation has no usable GPU."""

    def __init__(self, obstacles: list[Obstacle]) -> None:
        lines = [f"  {number}. {obstacle}" for number, obstacle in enumerate(obstacles, 1)]
        super().__init__("\n".join(["device='cuda' cannot run here (device='cpu' can):", *lines]))
        self.obstacles = obstacles


def require_gpu(*, num_ranks: int, transport: str, dispatch: str = "auto") -> GpuFacts:
    """The facts, if nothing stands in the way of `num_ranks` on this host."""
    facts = gather_facts()
    found = obstacles(facts, nccl=needs_nccl(facts, num_ranks=num_ranks, transport=transport))
    found += missing_library(dispatch)
    if found:
        raise DeviceUnavailable(found)
    return facts


def missing_library(dispatch: str) -> list[Obstacle]:
    """That `dispatch` names and Python does not find."""
    module, fix = _DISPATCH_LIBRARIES.get(dispatch, ("", ""))
    if not module or _is_installed(module):
        return []
    return [Obstacle(f"dispatch={dispatch!r} needs the module {module}, which is not installed", fix)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def needs_nccl(facts: GpuFacts, *, num_ranks: int, transport: str) -> bool:
    """Whether ranks will exchange over it: auto goes by way of the host where ranks share GPUs."""
    return num_ranks > 1 and (transport == "nccl" or (transport == "auto" and num_ranks <= len(facts.gpus)))


def obstacles(facts: GpuFacts, *, nccl: bool) -> list[Obstacle]:
    """In the order in which they are best removed; none: it can run. `nccl`: it is needed."""
    return [*device_obstacles(facts), *_nccl(facts, needed=nccl), *_cupy(facts)]


def device_obstacles(facts: GpuFacts, *, built: bool = True) -> list[Obstacle]:
    """Those that stop everything; NCCL's and CuPy's stop what needs them. `built`: our kernels have to be."""
    return [*_driver(facts), *_torch(facts), *(_kernels(facts) if built else [])]


def _driver(facts: GpuFacts) -> list[Obstacle]:
    if facts.driver_cuda is None:
        if facts.kernel_module is None:
            fix = "install NVIDIA's driver on a machine with a GPU, or use device='cpu'"
            return [Obstacle("there is no NVIDIA driver (neither a kernel module nor libcuda.so.1)", fix)]
        what = f"the kernel has NVIDIA's driver {facts.kernel_module}, but libcuda.so.1 is not found"
        return [Obstacle(what, "start the container with --gpus all, or put the driver's libraries on LD_LIBRARY_PATH")]
    if facts.driver_error:
        return [_start_failed(facts)]
    if not facts.gpus:
        return [_no_gpu(facts)]
    if any(gpu.capability >= CAPABILITY_MIN for gpu in facts.gpus):
        return []
    names = ", ".join(f"{gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})" for gpu in facts.gpus)
    return [Obstacle(f"no kernels for {names}", "use a GPU of compute capability 8.0 or later, or device='cpu'")]


def _start_failed(facts: GpuFacts) -> Obstacle:
    error = facts.driver_error
    if error == _NO_DEVICE:
        return _no_gpu(facts)
    if error == _NOT_PERMITTED:
        return Obstacle(
            "the driver refuses this process (CUDA error 800)", "give it access to the device files /dev/nvidia*"
        )
    if error in (_MISMATCH, _COMPAT):
        what = (
            f"libcuda.so.1 and the kernel's driver {facts.kernel_module or ''} do not go together (CUDA error {error})"
        )
        return Obstacle(
            what,
            "reboot after a driver update, or take a compat libcuda off LD_LIBRARY_PATH, so that both are one version",
        )
    return Obstacle(
        f"the driver does not start (CUDA error {error})", "see what `nvidia-smi` and the kernel's log (dmesg) say"
    )


def _no_gpu(facts: GpuFacts) -> Obstacle:
    if facts.hidden is not None:
        what = f"CUDA_VISIBLE_DEVICES={facts.hidden!r} shows this process no GPU"
        return Obstacle(what, "unset it, or name a GPU that `nvidia-smi -L` lists")
    return Obstacle(
        "the driver is here, but it shows no GPU", "start the container with --gpus all, or see `nvidia-smi -L`"
    )


def _torch(facts: GpuFacts) -> list[Obstacle]:
    major = _best_major(facts)
    if facts.torch_version is None:
        return [Obstacle("torch is not installed", _install_torch(major))]
    if facts.torch_cuda is None:
        return [Obstacle(f"torch {facts.torch_version} is built for the CPU", _install_torch(major))]
    wanted = _major(facts.torch_cuda)
    if facts.driver_cuda is None or facts.driver_cuda // 1000 >= wanted:
        return []
    what = (
        f"torch {facts.torch_version} is built for CUDA {facts.torch_cuda}, and the driver speaks {_cuda_text(facts)}"
    )
    need = DRIVER_FOR_CUDA.get(wanted)
    update = "update the driver" + (f" to {need} or later" if need else "")
    return [Obstacle(what, f"{update}, or {_install_torch(major)} and switchgear[cu{major}]")]


def _kernels(facts: GpuFacts) -> list[Obstacle]:
    if facts.kernels is not None:
        return []
    major = _torch_major(facts) or _best_major(facts)
    # PyPI's nvidia-cuda-nvcc-cu12 has ptxas and no nvcc.
    pip = f", or `pip install 'cuda-toolkit[nvcc,cudart,cccl]=={major}.*'`" if major >= 13 else ""
    fix = f"build it where nvcc is (a CUDA {major} toolkit{pip}), by `make cuda` in the repository's root"
    return [Obstacle("libswitchgear_cuda.so, our kernels, is not built", fix)]


def _nccl(facts: GpuFacts, *, needed: bool) -> list[Obstacle]:
    major = _torch_major(facts)
    both = _both("NCCL", facts.nccl, major, f"both write {NCCL_FILE}, and the last one written wins")
    if both:
        return both
    if not facts.nccl:
        extra = major or _best_major(facts)
        return [Obstacle("NCCL is not installed", f"`pip install 'switchgear[cu{extra}]'`")] if needed else []
    (package,) = facts.nccl
    found = _mismatch(package, facts, major)
    if facts.nccl_library is None:
        found.append(Obstacle(f"{package.name} has no {NCCL_FILE} on disk", _reinstall(package)))
    elif package.library_bytes is not None and package.library_bytes != facts.nccl_library_bytes:
        what = (
            f"{facts.nccl_library} has {facts.nccl_library_bytes} bytes, and {package.name} {package.version} wrote "
            f"{package.library_bytes}: another package has overwritten it"
        )
        found.append(Obstacle(what, _reinstall(package)))
    return found


def _cupy(facts: GpuFacts) -> list[Obstacle]:
    major = _torch_major(facts)
    both = _both("CuPy", facts.cupy, major, "they overwrite each other's files")
    if both or not facts.cupy:
        return both
    return _mismatch(facts.cupy[0], facts, major)


def _both(what: str, packages: tuple[Package, ...], major: int | None, why: str) -> list[Obstacle]:
    if len(packages) < 2:
        return []
    names = " and ".join(f"{package.name} {package.version}" for package in packages)
    remove = " ".join(package.name for package in packages)
    keep = major or max(package.cuda_major for package in packages)
    fix = f"`pip uninstall -y {remove}`, then `pip install 'switchgear[cu{keep}]'`"
    return [Obstacle(f"{what} is installed twice, as {names}: {why}", fix)]


def _mismatch(package: Package, facts: GpuFacts, major: int | None) -> list[Obstacle]:
    if major is None or package.cuda_major == major:
        return []
    what = (
        f"{package.name} {package.version} is for CUDA {package.cuda_major}, and torch is built for {facts.torch_cuda}"
    )
    fix = f"`pip uninstall -y {package.name}`, then `pip install 'switchgear[cu{major}]'`"
    return [Obstacle(what, fix)]


def _reinstall(package: Package) -> str:
    return f"`pip install --force-reinstall --no-deps {package.name}=={package.version}`"


def _install_torch(major: int) -> str:
    return f"`pip install torch --index-url https://download.pytorch.org/whl/{TORCH_INDEX[major]}`"


def _major(cuda: str) -> int:
    return int(cuda.split(".")[0])


def _torch_major(facts: GpuFacts) -> int | None:
    return None if facts.torch_cuda is None else _major(facts.torch_cuda)


def _best_major(facts: GpuFacts) -> int:
    """The newest CUDA that we have an extra for and the driver speaks; without a driver, the newest."""
    speaks = max(TORCH_INDEX) if facts.driver_cuda is None else facts.driver_cuda // 1000
    return max((major for major in TORCH_INDEX if major <= speaks), default=min(TORCH_INDEX))


def _cuda_text(facts: GpuFacts) -> str:
    assert facts.driver_cuda is not None
    return f"{facts.driver_cuda // 1000}.{facts.driver_cuda % 1000 // 10}"
