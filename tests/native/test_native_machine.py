"""Loading, instruction sets and the thread pool: forced choices, many Python threads at once, no CPU while idle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from switchgear_runtime import native, ops


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[1]), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_instruction_set_is_forced_by_the_environment() -> None:
    code = "from switchgear_runtime import native; print(native.core().sg_instruction_set().decode())"
    assert run_python(code, SWITCHGEAR_ISA="generic").stdout.strip() == "generic"
    wrong = run_python(code, SWITCHGEAR_ISA="sse9")
    assert "SWITCHGEAR_ISA='sse9' is unknown" in wrong.stderr


def test_import_of_ops_loads_nothing() -> None:
    code = "import switchgear_runtime.ops as o; print(any('libswitchgear' in l for l in open('/proc/self/maps')))"
    assert run_python(code).stdout.strip() == "False"


def test_missing_library_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    with pytest.raises(native.NativeLibraryMissing, match="pip install -e"):
        native.core.__wrapped__()
    (tmp_path / "libswitchgear.so").write_bytes(b"not a library")
    with pytest.raises(native.NativeLibraryMissing, match="does not load"):
        native.core.__wrapped__()


def test_unknown_settings_raise() -> None:
    with pytest.raises(ValueError, match="instruction_set=mmx"):
        ops.set_instruction_set("mmx")
    for num_threads in (0, -1, 100_000):
        with pytest.raises(ValueError, match=f"num_threads={num_threads}"):
            ops.set_num_threads(num_threads)
    assert ops.num_threads() == 1
    assert ops.kernel_version()


def test_python_threads_share_the_pool() -> None:
    """Calls from several threads, while another resizes the pool: every result is right, and nothing hangs."""
    torch.manual_seed(0)
    weight = ops.pack(torch.randn(600, 64), "f32")
    inputs = [torch.randn(9, 64) for _ in range(4)]
    expected = [ops.linear(x, weight) for x in inputs]
    wrong: list[int] = []
    stop = threading.Event()

    def work(i: int) -> None:
        while not stop.is_set():
            if not torch.equal(ops.linear(inputs[i], weight), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for num_threads in [2, 3, 1, 4, 2, 1] * 4:
        ops.set_num_threads(num_threads)
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong


def test_idle_workers_use_no_cpu() -> None:
    """In a process of its own: this one may hold threads of other tests (Ray's, for one, use 8 % of a core)."""
    code = """
import time, torch
from switchgear_runtime import ops
weight = ops.pack(torch.randn(600, 64), "f32")
ops.set_num_threads(3)
ops.linear(torch.randn(9, 64), weight)
time.sleep(0.05)
before_s = time.process_time()
time.sleep(0.5)
print(time.process_time() - before_s)
"""
    result = run_python(code)
    assert float(result.stdout) < 0.1, result.stderr  # one worker that spins uses 0.5


def test_forked_child_computes_alone() -> None:
    """A child of fork has no workers; an op there must not wait for them."""
    code = """
import os, torch
from switchgear_runtime import ops
weight = ops.pack(torch.randn(600, 64), "f32"); x = torch.randn(9, 64)
ops.set_num_threads(3); y = ops.linear(x, weight)
pid = os.fork()
if pid == 0:
    same = torch.equal(ops.linear(x, weight), y) and ops.num_threads() == 1
    ops.set_num_threads(2)  # and it can start its own
    os._exit(0 if same and torch.equal(ops.linear(x, weight), y) else 1)
print(os.waitpid(pid, 0)[1])
"""
    result = run_python(code)
    assert result.stdout.strip() == "0", result.stderr


def test_bytes_tensor_shares_memory() -> None:
    data = bytearray(range(100))
    view = memoryview(data)[10:20].toreadonly()
    tensor = ops.bytes_tensor(view)
    assert tensor.tolist() == list(range(10, 20))
    data[10] = 99
    assert tensor[0] == 99
    assert ops.bytes_tensor(b"").numel() == 0
    assert ops.bytes_tensor(b"abc").tolist() == [97, 98, 99]
