"""What the suite needs and runs on: packages that are `missing`, `versions`, the `commit` of the checkout."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from switchgear_bench.suite.processes import ROOT

MODULES = (
    "numpy",
    "pytest",
    "pytest_timeout",
    "hypothesis",
    "msgspec",
    "msgpack",
    "safetensors",
    "tokenizers",
    "transformers",
)
_SHORT = 9  # characters of a commit


def missing(modules: Sequence[str]) -> str | None:
    """Which packages this Python lacks, and how to bring them, also where no network is."""
    names = " ".join(module.replace("_", "-") for module in modules if find_spec(module) is None)
    if not names:
        return None
    python, machine, folder = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine(), "gpu-packages"
    wheels = f"--only-binary :all: --python-version {python}"
    wheels += "".join(f" --platform {tag}_{machine}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"))
    return "\n".join(
        [
            f"{sys.executable} has no {names}. Into a folder of their own:",
            f"    pip install --target {folder} {names}",
            "  or, where there is no network, on another machine, and bring the folder here:",
            f"    pip install --target {folder} {wheels} {names}",
            "  then:",
            f"    PYTHONPATH={folder} {Path(sys.executable).name} bench/gpu_suite.py",
        ]
    )


def versions(given_commit: str | None, root: Path = ROOT) -> dict[str, str]:
    """Of what the numbers hang on, where it is known."""
    found = {"python": sys.version.split()[0], "when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    known = given_commit or commit(root)
    return found | ({"commit": known} if known else {})


def commit(root: Path) -> str | None:
    """By git, or where there is none from its files; None: this is no checkout."""
    git = shutil.which("git")
    if git is not None and (root / ".git").exists():
        done = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            return done.stdout.strip()[:_SHORT]
    return commit_of_files(root / ".git")


def commit_of_files(folder: Path) -> str | None:
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:_SHORT] or None
        name = head.removeprefix("ref: ")
        if (folder / name).is_file():
            return (folder / name).read_text().strip()[:_SHORT]
        packed = (folder / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line[:_SHORT] for line in packed if line.endswith(f" {name}")), None)
