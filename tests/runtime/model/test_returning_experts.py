"""An expert that comes back to a rank: the same memory of the host's weight cache, at the same pace."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from switchgear.config import bundled_model
from switchgear_runtime.migration.pace import Pace, StagingCancelled
from switchgear_runtime.model import blob_file
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.weight_store import WeightStore
from switchgear_runtime.system import RealSystem


def store_in(folder: str) -> WeightStore:
    return WeightStore(Checkpoint(bundled_model()), torch.bfloat16, weight_cache=folder)


def test_it_is_the_same_memory_and_every_byte_is_paced_again(tmp_path: Path) -> None:
    store = store_in(str(tmp_path))
    first = store.expert(1, 5)
    pieces: list[int] = []
    again = store.expert(1, 5, pieces.append)
    assert [one.data.data_ptr() for one in again] == [one.data.data_ptr() for one in first]
    num_bytes = sum(one.data.nbytes for one in first)
    assert num_bytes <= sum(pieces) < num_bytes + mmap.PAGESIZE  # the gap between the two
    other = store_in("").expert(1, 5)  # in private memory
    assert all(torch.equal(one.data, two.data) for one, two in zip(again, other, strict=True))


def test_a_cancelled_job_ends_in_it(tmp_path: Path) -> None:
    store = store_in(str(tmp_path))
    store.expert(2, 7)
    pace = Pace(RealSystem(), None)
    pace.cancel()
    with pytest.raises(StagingCancelled):
        store.expert(2, 7, pace)


def test_pages_that_the_kernel_dropped_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(str(tmp_path))
    store.expert(1, 5)
    mincore = blob_file._mincore()
    populated: list[int] = []
    monkeypatch.setattr(blob_file.BlobFile, "_populate", lambda _self, _start, num_bytes: populated.append(num_bytes))
    store.expert(1, 5)
    assert populated == []

    def hole(address: int, num_bytes: int, residence: ctypes.Array[ctypes.c_char]) -> int:
        status = mincore(address, num_bytes, residence)
        residence[1] = b"\0"
        return status

    monkeypatch.setattr(blob_file, "_mincore", lambda: hole)
    store.expert(1, 5)
    assert len(populated) == 1


def test_private_memory_is_not_kept() -> None:
    store = store_in("")
    first = store.expert(1, 5)
    assert store.expert(1, 5)[0].data.data_ptr() != first[0].data.data_ptr()
