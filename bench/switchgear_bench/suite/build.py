"""The native libraries, built into the tree for the GPU that is there: `Build`. First all that needs no torch; then its binding."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from switchgear_bench.suite.budget import Budget
from switchgear_bench.suite.log import Log
from switchgear_bench.suite.processes import ROOT, run
from switchgear_bench.suite.steps import Outcome, Status

NATIVE = ROOT / "runtime" / "switchgear_runtime" / "_native"
FOLDER = ROOT / "build" / "gpu"
BUILD_S = 900.0
LEFT_OUT = "CUDA kernels: left out"  # CMakeLists.txt's words
TARGETS = ("switchgear_cuda", "switchgear", "switchgear_cuda_twin", "switchgear_bench")
BINDING = "switchgear_torch"


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name of the code that a GPU runs best: its own, where csrc/cuda has some, else PTX of the oldest."""
    return {(9, 0): "90a-real", (10, 0): "100-real"}.get(capability, "80")


def tool(name: str) -> str | None:
    """On the PATH, or beside this Python, where pip puts programs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


class Build:
    """`torch_folder`: of the installed package, which the binding is linked with."""

    def __init__(self, capability: tuple[int, int], torch_folder: Path, log: Log, budget: Budget) -> None:
        self._capability = capability
        self._torch_folder = torch_folder
        self._log = log
        self._budget = budget

    def libraries(self) -> Outcome:
        """Kernels, their twin and the core; all cores take part."""
        if tool("cmake") is None:
            return Outcome(Status.FAILED, "failed: there is no cmake; `pip install cmake ninja` brings one")
        NATIVE.mkdir(parents=True, exist_ok=True)
        failed = self._failed(self.configure(), [self._make(*TARGETS), self._install("Unspecified")])
        if failed is not None:
            return failed
        if not (NATIVE / "libswitchgear_cuda.so").is_file():
            return Outcome(Status.FAILED, "failed: CMake installed no libswitchgear_cuda.so")
        return Outcome(Status.PASSED, "built")

    def binding(self) -> Outcome:
        """torch's ops, of the CPU engine and the sampler on the host; kernels do without."""
        failed = self._failed([], [self._make(BINDING), self._install("torch")])
        if failed is None:
            return Outcome(Status.PASSED, "built")
        return Outcome(failed.status, f"{failed.text}; what needs torch's ops is left out", failed.log)

    def configure(self) -> list[str]:
        command = [
            *(tool("cmake") or "cmake", "-S", str(ROOT), "-B", str(FOLDER), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DTORCH_ROOT={self._torch_folder}",
            f"-DCMAKE_INSTALL_PREFIX={NATIVE}",
            f"-DSWITCHGEAR_CUDA_ARCHITECTURES={architecture(self._capability)}",
        ]
        ninja = tool("ninja")
        if ninja is not None and tool("make") is None and not (FOLDER / "CMakeCache.txt").is_file():
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return command

    @staticmethod
    def _make(*targets: str) -> list[str]:
        num_cores = len(os.sched_getaffinity(0))
        return [tool("cmake") or "cmake", "--build", str(FOLDER), "--parallel", str(num_cores), "--target", *targets]

    @staticmethod
    def _install(component: str) -> list[str]:
        return [tool("cmake") or "cmake", "--install", str(FOLDER), "--component", component]

    def _failed(self, configure: Sequence[str], commands: Sequence[Sequence[str]]) -> Outcome | None:
        for command in [configure, *commands] if configure else commands:
            job = run(command, timeout_s=BUILD_S, log=self._log, budget=self._budget)
            if job.is_cut:
                return Outcome(Status.CUT, f"cut by the budget after {job.seconds:.0f} s", job.said())
            if job.status != 0:
                words = f"took more than {BUILD_S:.0f} s" if job.is_late else f"status {job.status}"
                what = " ".join([Path(command[0]).name, *command[1:2]])
                return Outcome(Status.FAILED, f"failed: {what}: {words}", job.said())
            left_out = [line for line in job.lines if LEFT_OUT in line] if command is configure else []
            if left_out:
                return Outcome(Status.FAILED, f"failed: {left_out[0].removeprefix('-- ')}", job.said())
        return None
