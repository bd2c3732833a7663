"""The native channel under ThreadSanitizer and AddressSanitizer: ranks as threads, no Python (tests/native_comm)."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [
    str(source) for folder in ("tests/native_comm", "csrc/comm") for source in sorted((ROOT / folder).glob("*.cpp"))
]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_channel_is_clean(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "channel_stress"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-Icsrc", "-pthread"]
    assert COMPILER is not None
    build = subprocess.run(
        [COMPILER, *flags, *SOURCES, "-o", str(program)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if build.returncode and "cannot find -l" in build.stderr:
        pytest.skip(f"this compiler has no -fsanitize={sanitizers}")
    assert build.returncode == 0, build.stderr
    # The last ones have messages long enough for a buffer to be used again at once (kReuseBytes in layout.h); the one
    # before, ranks that wake each other.
    for world_size, num_calls, mailbox_bytes, *crowded in (
        *((world_size, 200, 1024) for world_size in (1, 2, 3, 5, 8)),
        (8, 1500, 1024, "crowded"),
        (2, 12, 2 << 20),
        (3, 8, 2 << 20),
    ):
        seed = secrets.randbits(32)
        command = [str(program), *map(str, (seed, world_size, num_calls, mailbox_bytes, *crowded))]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (run.returncode, run.stderr) == (0, ""), f"{' '.join(command)}\n{run.stderr}"
