"""The sdist builds the wheel, the wheel serves from a clean environment, and its libraries need nothing unusual.

Slow: it compiles everything. The clean environment sees the installed dependencies, and of switchgear only the wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "cluster", "bench")
SDIST_BYTES_MAX = 40 << 20
WHEEL_BYTES_MAX = 40 << 20
# What a manylinux wheel may need of its host, and torch, which is a dependency.
LIBRARIES_ALLOWED = {
    "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libtorch_cpu.so", "libtorch.so", "libc10.so", "libswitchgear.so",
}  # fmt: skip


def call(*command: str | Path, cwd: Path, timeout_s: float = 600) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of the tree, as any PEP 517 front end makes it without isolation."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", ".*", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    code = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", code, folder, cwd=folder / "tree")
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    call(*pip, "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, sdist, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel. A plain .pth line brings the dependencies in, and no editable install."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    call(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "venv" / "bin" / "python",
        "install", "--no-deps", "--no-index", wheel, cwd=folder,
    )  # fmt: skip
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_sdist_has_the_sources_and_nothing_built(sdist: Path) -> None:
    assert sdist.stat().st_size < SDIST_BYTES_MAX
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (p for folder in (*PACKAGES, "csrc", "tests", "examples") for p in (ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".cpp", ".h", ".cu"} and not any(part.startswith(".") for part in path.parts):
            assert str(path.relative_to(ROOT)) in names
    assert {"CMakeLists.txt", "LICENSE", "requirements.lock", "Makefile"} <= names
    assert not [name for name in names if re.search(r"\.so$|\.pyc$|__pycache__|(^|/)\.", name)]


def test_the_wheel_has_three_packages_and_the_libraries(wheel: Path) -> None:
    assert re.fullmatch(r"switchgear-[0-9.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < WHEEL_BYTES_MAX
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    modules = {str(p.relative_to(ROOT / folder)) for folder in PACKAGES for p in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {
        name for name in modules if name.startswith("switchgear")
    }
    natives = {name for name in names if name.endswith(".so")}
    assert {Path(name).name for name in natives} >= {"libswitchgear.so", "libswitchgear_torch.so"}
    assert "switchgear/bundled/tiny-moe/model.safetensors" in names
    assert {"cu12", "cu13", "mpi", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_libraries_link_only_to_what_every_linux_has(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if "_native/" in name])
    for library in tmp_path.rglob("*.so"):
        text = call("readelf", "--dynamic", "--wide", library, cwd=tmp_path)
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
        assert needed <= LIBRARIES_ALLOWED, f"{library.name} needs {needed - LIBRARIES_ALLOWED}"
        if library.name != "libswitchgear_torch.so":
            assert not {name for name in needed if "torch" in name or "c10" in name}, library.name
        for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", text):
            assert path.startswith("$ORIGIN"), f"{library.name} has the run path {path}"


def test_the_wheel_serves_outside_the_checkout(environment: Path) -> None:
    binaries = environment / "venv" / "bin"
    where = call(
        binaries / "python", "-c", "import switchgear, switchgear_runtime as r; print(switchgear.__file__, r.__file__)",
        cwd=environment,
    )  # fmt: skip
    assert all(str(environment) in path for path in where.split())
    prompt = "harbor (noun):"
    common = ("--launcher", "local", "--ranks", "2")
    streamed = call(binaries / "switchgear", "run", prompt, *common, "--max-tokens", "12", cwd=environment)
    assert streamed.startswith(prompt) and len(streamed) > len(prompt) + 12
    server = subprocess.Popen(
        [str(binaries / "switchgear"), "serve", *common, "--port", "0"],
        cwd=environment, stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        code = (
            "import sys; from switchgear import Client, SamplingParams; client = Client(sys.argv[1]);"
            "print(client.generate([sys.argv[2]], SamplingParams(max_tokens=12, temperature=0))[0].outputs[0].text)"
        )
        text = call(binaries / "python", "-c", code, url, prompt, cwd=environment)
        assert streamed == prompt + text
    finally:
        server.terminate()
        status = server.wait(60)
        assert server.stdout is not None
        server.stdout.close()
    assert status == 0


def test_planning_and_env_commands_of_the_wheel(environment: Path) -> None:
    switchgear = environment / "venv" / "bin" / "switchgear"
    assert "expert slot pool" in call(switchgear, "plan", "--ranks", "2", cwd=environment)
    assert "torch" in call(switchgear, "collect-env", cwd=environment)
