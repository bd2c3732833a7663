"""CudaPeerMemory, over a CuPy that only notes its calls, and a CuPy that is broken."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import invalidate_caches
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from switchgear_runtime.comm import peer_memory
from switchgear_runtime.comm.peer_memory import IPC_BYTES, CudaPeerMemory, has_cupy


def test_a_gpus_memory_is_mapped_by_others_and_by_this_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a CuPy that only notes its calls: CUDA opens no handle of its own process."""
    calls: list[str] = []
    opened = {b"theirs": 77}

    def note(name: str, result: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (calls.append(name), result(*given))[1]

    runtime = SimpleNamespace(
        malloc=note("malloc", lambda num_bytes: 4096 if num_bytes == IPC_BYTES else 0),
        memsetAsync=lambda *_: None,
        free=note("free", lambda _: None),
        ipcGetMemHandle=note("get", lambda address: b"of %d" % address),
        ipcOpenMemHandle=note("open", lambda handle, _: opened[handle]),
        ipcCloseMemHandle=note("close", lambda _: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(CudaPeerMemory, "mark", lambda _: lambda: True)
    first, second, other = (CudaPeerMemory(torch.device("cuda", n)) for n in (0, 0, 1))
    mine = first.allocate(100)
    assert mine == 4096  # a block of its own
    handle = first.handle(mine)
    assert second.map(handle) == mine  # a rank that is another thread
    second.unmap(mine)
    with pytest.raises(OSError, match="this process's own, on cuda:0"):
        other.map(handle)
    assert calls == ["malloc", "get"]
    theirs = second.map(b"theirs")
    second.unmap(theirs)
    first.free(mine)
    assert calls == ["malloc", "get", "open", "close", "free"]
    opened[handle] = 88  # another process's, of the same bytes
    assert second.map(handle) == 88
    monkeypatch.setattr(CudaPeerMemory, "mark", lambda _: lambda: False)
    monkeypatch.setattr(peer_memory, "ZEROED_S", 0.0)
    calls.clear()
    with pytest.raises(TimeoutError, match="did not clear 100 bytes"):
        first.allocate(100)
    assert calls == ["malloc", "free"]


def test_a_cupy_that_cannot_be_imported_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cupy.py").write_text("raise ImportError('of another CUDA')\n")
    assert not has_cupy()
    (tmp_path / "cupy.py").write_text("")
    invalidate_caches()
    assert has_cupy()
    sys.modules.pop("cupy")
