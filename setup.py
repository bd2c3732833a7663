"""Builds the native libraries with CMake and maps three import packages to three folders; metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
LIBRARIES = ("libswitchgear.so", "libswitchgear_torch.so", "libswitchgear_bench.so", "libswitchgear_cuda_twin.so")


class CMakeExtension(Extension):
    """A placeholder: the sources are CMake's."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake once and puts the libraries into switchgear_runtime/_native (of the wheel, or of the tree if editable)."""

    def run(self) -> None:
        package = Path(self.build_lib)
        if self.inplace or self.editable_mode:
            package = ROOT / "runtime"
        target = package / "switchgear_runtime" / "_native"
        target.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"cmake-{sys.version_info.major}.{sys.version_info.minor}"
        build.mkdir(parents=True, exist_ok=True)
        import torch  # only for its headers' path; see pyproject's build requirements

        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DTORCH_ROOT={Path(torch.__file__).parent}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "switchgear_runtime" / "_native" / name) for name in LIBRARIES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuild(build_py):
    """Comes first, and starts from an empty folder: what an earlier build left there would end up in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """The libraries know no Python, and torch by its stable ABI: one wheel serves every Python of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


FOLDERS = ("runtime", "cluster", "bench")
packages = [
    name
    for folder in FOLDERS
    for name in find_namespace_packages(folder, include=["switchgear*"], exclude=["*.bundled*", "*._native*"])
]
setup(
    packages=packages,
    package_dir={
        "switchgear_runtime": "runtime/switchgear_runtime",
        "switchgear": "cluster/switchgear",
        "switchgear_bench": "bench/switchgear_bench",
    },
    ext_modules=[CMakeExtension("switchgear_runtime._native")],
    cmdclass={"bdist_wheel": AnyPythonWheel, "build_ext": CMakeBuild, "build_py": CleanBuild},
)
