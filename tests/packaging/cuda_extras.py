"""Installs the extras cu12 and cu13 for real, each in an environment of its own, and checks them without a GPU.

    python tests/packaging/cuda_extras.py [cu12] [cu13] [mixed] [nvcc12] [nvcc13] [nccl-ep] [--folder DIR] [--keep]

Needs the network and some GB of disk, one environment at a time; without names it does all. No torch is installed: a file
that says which CUDA torch would be for stands in for it, as the preflight reads nothing else of it. What each does:

- cu12, cu13: the extra's packages as pyproject.toml names them; NCCL loads, says the extra's CUDA and gives a unique id;
  CuPy imports without a driver; the preflight finds nothing but what needs a GPU.
- mixed: in cu13's environment the other CUDA's packages; the preflight names each trouble, and its fix, done, helps.
- nvcc12, nvcc13: the compiler from PyPI (CUDA 13's; of CUDA 12 there is ptxas alone), or this machine's, builds the
  kernels, and the library loads and says for what it was built.
- nccl-ep: the module of --dispatch nccl-ep, whose signatures are compared with the one that tests make up.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCH = {12: ("2.13.0+cu128", "12.8"), 13: ("2.13.0+cu130", "13.0")}
PROBE_NCCL = """
import ctypes, json
from switchgear_runtime.comm.nccl_library import UniqueId, nccl
found, own = nccl(), UniqueId()
result = found.library.ncclGetUniqueId(ctypes.byref(own))
print(json.dumps({"path": found.path, "version": found.version_text, "cuda": found.cuda_major,
                  "result": result, "id": any(bytes(own))}))
"""
PROBE_CUPY = """
import json, cupy
try:
    count = cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    count = str(error)
print(json.dumps({"version": cupy.__version__, "runtime": cupy.cuda.runtime.runtimeGetVersion(), "devices": count}))
"""
PROBE_PREFLIGHT = """
import json
from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.cuda.preflight import obstacles
print(json.dumps([[found.what, found.fix] for found in obstacles(gather_facts(), nccl=True)]))
"""
PROBE_KERNELS = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
for name in ("kind", "kernel_version", "architectures"):
    getattr(library, f"sg_cuda_{name}").restype = ctypes.c_char_p
print(json.dumps({"kind": library.sg_cuda_kind().decode(), "version": library.sg_cuda_kernel_version().decode(),
                  "architectures": library.sg_cuda_architectures().decode(), "toolkit": library.sg_cuda_toolkit(),
                  "driver": library.sg_cuda_driver(), "devices": library.sg_cuda_num_devices()}))
"""
PROBE_NCCL_EP = """
import functools, inspect, json, sys
import nccl.core, nccl.ep
def find(name):
    return functools.reduce(getattr, name.split("."), nccl)
own = nccl.core.get_unique_id()
print(json.dumps({"signatures": {name: list(inspect.signature(find(name)).parameters) for name in json.loads(sys.argv[1])},
                  "numbers": {name: int(find(name)) for name in json.loads(sys.argv[2])},
                  "id": nccl.core.UniqueId.from_bytes(own.as_bytes).as_bytes == own.as_bytes}))
"""
NCCL_EP_CALLS = [
    *(f"ep.{name}" for name in ("GroupConfig", "Group.create", "Group.create_handle", "Group.destroy")),
    *(f"ep.Handle.{name}" for name in ("update", "dispatch", "combine", "destroy")),
    *(f"ep.{name}" for name in ("LayoutInfo", "DispatchInputs", "DispatchOutputs", "CombineInputs", "CombineOutputs")),
    *(f"core.{name}" for name in ("Communicator.init", "get_unique_id", "UniqueId.from_bytes")),
]
NCCL_EP_NUMBERS = [
    *(f"core.{name}" for name in ("BFLOAT16", "FLOAT32", "INT32", "INT64")),
    *(f"ep.Algorithm.{name}" for name in ("LOW_LATENCY", "HIGH_THROUGHPUT")),
    *(f"ep.Layout.{name}" for name in ("UNSET", "EXPERT_MAJOR", "RANK_MAJOR", "FLAT")),
]


class CheckFailed(Exception):
    """What was found is not what this script promises."""


def check(holds: bool, what: object) -> None:
    if not holds:
        raise CheckFailed(str(what))


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees this checkout's runtime and nothing else of this Python's packages."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=True)
        made = cls(folder)
        (made.site / "checkout.pth").write_text(f"{ROOT / 'runtime'}\n")
        return made

    @property
    def site(self) -> Path:
        (site,) = (self.folder / "lib").glob("python*/site-packages")
        return site

    def run(self, *command: str, timeout_s: float = 3600) -> str:
        done = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=self.folder,
            env={**os.environ, "PYTHONNOUSERSITE": "1"},
        )
        check(done.returncode == 0, f"{shlex.join(command)[:200]}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        return done.stdout

    def pip(self, *arguments: str) -> None:
        self.run("pip", "-q", "--disable-pip-version-check", "--no-input", *arguments)

    def ask(self, probe: str, *arguments: str) -> Any:
        return json.loads(self.run("python", "-c", probe, *arguments).splitlines()[-1])

    def versions(self) -> str:
        listed = json.loads(self.run("pip", "--disable-pip-version-check", "list", "--format", "json"))
        names = ("nvidia", "cupy", "cuda", "nccl")
        return ", ".join(f"{p['name']} {p['version']}" for p in listed if p["name"].startswith(names))

    def pretend_torch(self, major: int) -> None:
        version, cuda = TORCH[major]
        package = self.site / "torch"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


def extra(major: int) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements: list[str] = project["optional-dependencies"][f"cu{major}"]
    return requirements


# --- the extras -------------------------------------------------------------------------------------------------------


def one_cuda(folder: Path, major: int) -> Environment:
    environment = Environment.make(folder)
    environment.pip("install", *extra(major))
    environment.pretend_torch(major)
    print(f"  {environment.versions()}")
    nccl = environment.ask(PROBE_NCCL)
    check(nccl["cuda"] == major and nccl["result"] == 0 and nccl["id"], nccl)
    check(str(environment.site) in nccl["path"], nccl)
    print(f"  NCCL {nccl['version']} for CUDA {nccl['cuda']} loads and gives a unique id")
    cupy = environment.ask(PROBE_CUPY)
    check(cupy["runtime"] // 1000 == major, cupy)
    print(f"  CuPy {cupy['version']} imports; its CUDA is {cupy['runtime']}; of devices it says: {cupy['devices']}")
    left = [what for what, _ in environment.ask(PROBE_PREFLIGHT) if not _needs_more_than_packages(what)]
    check(not left, left)
    print("  the preflight finds nothing that packages could change")
    return environment


def _needs_more_than_packages(what: str) -> bool:
    return any(word in what for word in ("driver", "libswitchgear_cuda.so", "GPU"))


def mixed(folder: Path) -> None:
    """Every trouble that the two extras can make of each other, in the order of a user's mistakes."""
    environment = one_cuda(folder, 13)
    nccl12 = next(re.split(r"[<>=]", wanted)[0] for wanted in extra(12) if "nccl" in wanted)

    environment.pip("install", *extra(12))
    _expect(environment, "NCCL is installed twice", "CuPy is installed twice")
    _repair(environment, "NCCL is installed twice")
    _repair(environment, "CuPy is installed twice")
    _expect(environment)

    environment.pip("install", "--no-deps", nccl12)
    environment.pip("uninstall", "-y", nccl12)  # it takes the file along that both wrote
    _expect(environment, "has no libnccl.so.2 on disk")
    _repair(environment, "has no libnccl.so.2 on disk")
    _expect(environment)

    environment.pip("install", "--no-deps", nccl12)
    shutil.rmtree(next(environment.site.glob("nvidia_nccl_cu12-*.dist-info")))  # as an image layer may leave it
    _expect(environment, "another package has overwritten it")
    check(environment.ask(PROBE_NCCL)["cuda"] == 12, "the library should be cu12's by now")
    _repair(environment, "another package has overwritten it")
    _expect(environment)
    check(environment.ask(PROBE_NCCL)["cuda"] == 13, "the library should be cu13's again")

    environment.pretend_torch(12)
    _expect(environment, "nvidia-nccl-cu13", "cupy-cuda13x")
    _repair(environment, "nvidia-nccl-cu13")
    _repair(environment, "cupy-cuda13x")
    _expect(environment)
    print(f"  {environment.versions()}")


def _expect(environment: Environment, *words: str) -> None:
    """The preflight names these, and nothing else that packages could change."""
    found = [what for what, _ in environment.ask(PROBE_PREFLIGHT) if not _needs_more_than_packages(what)]
    check(len(found) == len(words), f"expected {words}, found {found}")
    for word in words:
        check(any(word in what for what in found), f"expected {word!r} among {found}")
    for what in found:
        print(f"  named: {what}")


def _repair(environment: Environment, word: str) -> None:
    """Does what the fix says; `pip install 'switchgear[cu13]'` is its extra's packages here."""
    fix = next((fix for what, fix in environment.ask(PROBE_PREFLIGHT) if word in what), None)
    check(fix is not None, f"{word!r} is not found any more")
    for command in re.findall(r"`pip ([^`]*)`", fix or ""):
        words = shlex.split(command)
        wanted = re.fullmatch(r"switchgear\[cu(\d+)\]", words[-1])
        environment.pip(*words[:-1], *(extra(int(wanted[1])) if wanted else [words[-1]]))
    print(f"  done: {fix}")


# --- the compiler and NCCL EP -----------------------------------------------------------------------------------------


def kernels(folder: Path, major: int) -> None:
    environment = Environment.make(folder)
    environment.pip("install", f"cuda-toolkit[nvcc,cudart,cccl]=={major}.*")
    print(f"  {environment.versions()}")
    own = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))]
    found = [*map(str, environment.site.glob("nvidia/*/bin/nvcc")), *filter(None, own)]
    nvcc = next((path for path in found if _major_of(path) == major), None)
    if nvcc is None:
        print(f"  NOT CHECKED: neither PyPI nor this machine has an nvcc of CUDA {major}; CUDACXX may name one")
        return
    print(f"  {nvcc}")
    build = folder / "kernels"
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
    ]
    make = ["cmake", "--build", str(build), "--target", "switchgear_cuda", "-j", "2"]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        check(done.returncode == 0, f"{command[:3]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    built = environment.ask(PROBE_KERNELS, str(build / "libswitchgear_cuda.so"))
    check(built["kind"] == "cuda" and built["toolkit"] // 1000 == major, built)
    check(built["architectures"] in ("80 90a 100", "80 90a"), built)
    print(f"  kernels {built['version']} by CUDA {built['toolkit']} for {built['architectures']}: loaded; {built}")


def _major_of(nvcc: str) -> int:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"release (\d+)\.", said)
    return 0 if found is None else int(found[1])


def nccl_ep(folder: Path) -> None:
    """The NCCL EP of CUDA 13, without NCCL itself and without the libraries that it compiles kernels with."""
    environment = Environment.make(folder)
    environment.pip("install", "--no-deps", "nccl-extensions", "nccl4py")
    environment.pip("install", "cuda-core~=1.0", "cuda-bindings~=13.0", "packaging", "numpy", "nvidia-nccl-cu13")
    print(f"  {environment.versions()}")
    real = environment.ask(PROBE_NCCL_EP, json.dumps(NCCL_EP_CALLS), json.dumps(NCCL_EP_NUMBERS))
    check(real["id"], "a unique id should survive its bytes")
    sys.path.insert(0, str(ROOT / "tests" / "runtime" / "cuda"))
    import fake_nccl_ep

    modules = fake_nccl_ep.make_modules(fake_nccl_ep.Hub(1))

    def find(name: str) -> Any:
        module, _, path = name.partition(".")
        return functools.reduce(getattr, path.split("."), modules[f"nccl.{module}"])

    for name, parameters in real["signatures"].items():
        ours = list(inspect.signature(find(name)).parameters)
        check(ours == parameters, f"{name}: real {parameters}, made up {ours}")
    for name, number in real["numbers"].items():
        check(find(name) == number, f"{name}: real {number}, made up {find(name)}")
    print(f"  {len(real['signatures'])} signatures and {len(real['numbers'])} numbers are as tests have them")


CHECKS: dict[str, Callable[[Path], object]] = {
    "cu12": lambda folder: one_cuda(folder, 12),
    "cu13": lambda folder: one_cuda(folder, 13),
    "mixed": mixed,
    "nvcc12": lambda folder: kernels(folder, 12),
    "nvcc13": lambda folder: kernels(folder, 13),
    "nccl-ep": nccl_ep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*CHECKS, []], help="which; default: all")
    parser.add_argument("--folder", help="where environments are made, one at a time; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    arguments = parser.parse_args()
    parent = Path(arguments.folder).resolve() if arguments.folder else None
    failed = []
    for name in arguments.names or CHECKS:
        print(f"{name}:", flush=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        begin_s = time.monotonic()
        try:
            CHECKS[name](folder)
            print(f"  ok, {time.monotonic() - begin_s:.0f} s", flush=True)
        except CheckFailed as error:
            print(f"  FAILED: {error}", flush=True)
            failed.append(name)
        finally:
            if not arguments.keep:
                shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
