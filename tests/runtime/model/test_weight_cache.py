"""The cache of packed weights: shared, found again, never stale, never half written, and never in the run's way."""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import make_checkpoint
from torch import Tensor

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model import blob_file, cache_folder, weight_cache
from switchgear_runtime.model.blob_file import BlobFile, Layout
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.weight_cache import WeightCache, WeightCacheKey, weight_cache_folder

BLOBS = {"a": 1, "b": 5000, "c": 4096, "d": 12345, "e": 70000}
KEY = WeightCacheKey(folder="/models/m", checkpoint="1", format="bf16", layout="7")


@pytest.fixture(autouse=True)
def small_blobs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "SHARED_BYTES_MIN", 0)
    monkeypatch.setattr(blob_file, "FREE_BYTES_MIN", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def content(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(0, 256, (BLOBS[name],), dtype=torch.uint8, generator=generator)


def filler(name: str, calls: Counter[str] | None = None) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        if calls is not None:
            calls[name] += 1
        out.copy_(content(name))

    return fill


def refuse(_out: Tensor) -> None:
    raise AssertionError("was asked to pack what the cache has")


def open_cache(folder: Path | None, key: WeightCacheKey = KEY, rank: int = 0) -> WeightCache:
    return WeightCache.open(folder, key, BLOBS, rank=rank)


def fill_all(cache: WeightCache) -> None:
    for name in BLOBS:
        assert torch.equal(cache.get(name, filler(name)), content(name)), name


def replaced(key: WeightCacheKey, **changes: str) -> WeightCacheKey:
    return WeightCacheKey(**{name: changes.get(name, getattr(key, name)) for name in key.__dataclass_fields__})


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- sharing --------------------------------------------------------------------------------------------------------


def test_the_first_packs_and_the_others_map(folder: Path) -> None:
    first, second = open_cache(folder), open_cache(folder, rank=1)
    fill_all(first)
    for name in BLOBS:
        blob = second.get(name, refuse)
        assert torch.equal(blob, content(name))
        assert blob.dtype == torch.uint8 and blob.data_ptr() % 4096 == 0
    assert (first.num_filled, second.num_filled, second.num_mapped) == (len(BLOBS), 0, len(BLOBS))
    assert first.is_shared and first.num_bytes == sum(BLOBS.values()) and second.num_private == 0
    assert first.verify() == []


def test_blobs_outlive_the_cache_and_the_file(folder: Path) -> None:
    cache = open_cache(folder)
    blob = cache.get("e", filler("e"))
    assert cache.path is not None
    cache.path.unlink()
    del cache
    assert torch.equal(blob, content("e"))


def test_files_are_the_users_alone(folder: Path) -> None:
    fill_all(open_cache(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_disk_space_is_taken_by_blobs_that_are_filled(folder: Path) -> None:
    cache = WeightCache.open(folder, KEY, {"dense": 1 << 20, **{f"expert {e}": 1 << 30 for e in range(8)}})
    cache.get("dense", lambda out: out.fill_(1))  # type: ignore[arg-type, return-value]
    assert cache.path is not None and cache.path.stat().st_size > 8 << 30
    assert cache.path.stat().st_blocks * 512 < 2 << 20


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_start_together_share_the_work(folder: Path, seed: int) -> None:
    """Each blob is packed once, by whoever comes first; descriptors of one process lock each other out like ranks."""
    calls: Counter[str] = Counter()
    packers: set[int] = set()
    barrier = threading.Barrier(4, timeout=20)
    failures: list[BaseException] = []
    rng = random.Random(seed)
    orders = [rng.sample(list(BLOBS), len(BLOBS)) for _ in range(4)]

    def run(rank: int) -> None:
        def slow(name: str) -> Callable[[Tensor], None]:
            def fill(out: Tensor) -> None:
                time.sleep(0.01)
                packers.add(rank)
                filler(name, calls)(out)

            return fill

        try:
            barrier.wait()
            cache = open_cache(folder, rank=rank)
            cache.prepare({name: slow(name) for name in orders[rank]})
            for name in orders[rank]:
                assert torch.equal(cache.get(name, slow(name)), content(name))
            cache.publish()
        except BaseException as error:  # noqa: BLE001 (shown below)
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures, (seed, failures)
    assert calls == Counter(list(BLOBS)), seed
    assert len(packers) > 1, seed


def test_a_fill_that_fails_publishes_nothing_and_frees_the_blob(folder: Path) -> None:
    def fail(_out: Tensor) -> None:
        raise ValueError("bad weights")

    cache = open_cache(folder)
    for call in (lambda: cache.get("b", fail), lambda: cache.prepare({"b": fail})):
        with pytest.raises(ValueError, match="bad weights"):
            call()
    assert torch.equal(open_cache(folder).get("b", filler("b")), content("b"))


# --- staleness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["checkpoint", "layout"])
def test_a_changed_checkpoint_or_kernel_removes_the_old_file(folder: Path, part: str) -> None:
    old = open_cache(folder)
    fill_all(old)
    new = open_cache(folder, replaced(KEY, **{part: "2"}))
    assert new.path != old.path and list(folder.glob("*.weights")) == [new.path]
    fill_all(new)
    assert new.num_filled == len(BLOBS)
    assert torch.equal(old.get("e", refuse), content("e"))  # who runs goes on


@pytest.mark.parametrize("part", ["format", "folder"])
def test_other_formats_and_models_keep_their_files(folder: Path, part: str) -> None:
    fill_all(open_cache(folder))
    fill_all(open_cache(folder, replaced(KEY, **{part: "other"})))
    assert len(list(folder.glob("*.weights"))) == 2
    open_cache(folder).get("a", refuse)


def test_other_blobs_are_another_file(folder: Path) -> None:
    fill_all(open_cache(folder))
    other = WeightCache.open(folder, KEY, BLOBS | {"e": 70001})
    assert not other.get("e", lambda out: out.zero_()).any()  # type: ignore[arg-type, return-value]


def test_the_key_sees_a_change_in_experts_alone(tmp_path: Path) -> None:
    """The checkpoint's identity does not read experts; a cache that did not notice would serve the old ones."""
    model = make_checkpoint(tmp_path, "qwen3_moe", 0)
    before = WeightCacheKey.of(Checkpoint(model), format="f", layout="l")
    assert before == WeightCacheKey.of(Checkpoint(model), format="f", layout="l")
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[Checkpoint(model).entry("model.layers.1.mlp.experts.4.up_proj.weight").start] ^= 1
    path.write_bytes(data)
    after = WeightCacheKey.of(Checkpoint(model), format="f", layout="l")
    assert after.model == before.model and after.source != before.source


# --- crashes --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_made_anew(folder: Path) -> None:
    for damage in (lambda path: os.truncate(path, 100), lambda path: path.write_bytes(b"x" * path.stat().st_size)):
        cache = open_cache(folder)
        fill_all(cache)
        assert cache.path is not None
        inode = cache.path.stat().st_ino
        copy = cache.path.read_bytes()
        cache.path.unlink()
        cache.path.write_bytes(copy)
        damage(cache.path)
        again = open_cache(folder)
        fill_all(again)
        assert again.num_filled == len(BLOBS) and again.path == cache.path and cache.path.stat().st_ino != inode


def test_a_leftover_of_creation_is_removed(folder: Path) -> None:
    path = open_cache(folder).path
    assert path is not None
    path.rename(path.with_name(path.name + ".new"))
    fill_all(open_cache(folder))
    assert list(folder.glob("*.new")) == []


def test_blobs_not_yet_durable_are_trusted_in_this_boot_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(folder)
    for name in ("a", "b", "c"):
        cache.get(name, filler(name))
    cache.publish()
    file = cache._file
    assert file is not None
    wait_until(lambda: all(file.is_durable(index) for index in range(3)))
    cache.get("d", filler("d"))
    assert not file.is_durable(3)
    open_cache(folder).get("d", refuse)
    monkeypatch.setattr(blob_file, "boot_token", lambda: 1 << 63 | 42)  # as after a power cut
    after = open_cache(folder)
    for name in ("a", "b", "c"):
        after.get(name, refuse)
    fill_all(after)
    assert after.num_filled == 2  # d and e


def test_what_a_killed_rank_left_becomes_durable_with_the_next(folder: Path) -> None:
    open_cache(folder).get("b", filler("b"))  # and never publishes
    cache = open_cache(folder)
    cache.get("b", refuse)
    cache.publish()
    wait_until(lambda: cache._file is not None and cache._file.is_durable(1))


def test_a_disk_that_fails_to_sync_loses_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(BlobFile, "_sync", fail)
    cache = open_cache(folder)
    cache.get("b", filler("b"))
    cache.publish()
    wait_until(lambda: cache.path is not None and not cache.path.exists())
    wait_until(lambda: "cannot be synced" in caplog.text)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from switchgear_runtime.model.blob_file import BlobFile, Layout
from switchgear_runtime.model.cache_folder import CacheFolder
path, layout = Path(sys.argv[1]), Layout.of({}, {str(i): 300_000 for i in range(64)})
folder = CacheFolder.prepare(path)
with folder.locked(10):
    descriptor = folder.open("f")
    if descriptor is None:
        descriptor = folder.create("f", lambda new: BlobFile.initialise(new, layout))
file = BlobFile(descriptor, layout)
print("ready", flush=True)
for index in range(64):
    if not file.is_published(index) and file.try_lock(index):
        file.write(index, np.full(300_000, index + 1, dtype=np.uint8))
        file.make_durable([index])
        file.unlock(index)
print("done", flush=True)
sys.stdin.read()
"""


def test_sigkill_at_any_moment_leaves_whole_blobs_and_no_lock(folder: Path) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    layout = Layout.of({}, {str(index): 300_000 for index in range(64)})
    script = KILLED.replace(
        "import numpy", "import switchgear_runtime.model.blob_file as b; b.FREE_BYTES_MIN = 0\nimport numpy"
    )
    for _ in range(6):
        children = [
            subprocess.Popen([sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n", seed
        time.sleep(rng.random() * 0.05)
        for child in children:
            child.kill()
            child.communicate(timeout=20)
        descriptor = cache_folder.CacheFolder.prepare(folder).open("f")
        assert descriptor is not None and BlobFile.matches(descriptor, layout), seed
        file = BlobFile(descriptor, layout)
        for index in range(64):
            assert file.try_lock(index), (seed, index)
            file.unlock(index)
            if file.is_published(index):
                assert (file.view(index) == index + 1).all() and file.crc_matches(index), (seed, index)


def test_a_write_into_a_shared_blob_ends_the_writer_and_spares_the_blob(folder: Path) -> None:
    code = """
import sys, numpy as np
from pathlib import Path
from switchgear_runtime.model.blob_file import BlobFile, Layout
import os
layout = Layout.of({}, {"a": 5000})
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
BlobFile.initialise(descriptor, layout)
file = BlobFile(descriptor, layout)
assert file.try_lock(0)
file.write(0, np.zeros(5000, dtype=np.uint8))
file.view(0)[0] = 1
"""
    path = folder.parent / "file"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False).returncode == -11
    layout = Layout.of({}, {"a": 5000})
    assert not BlobFile(os.open(path, os.O_RDWR), layout).view(0).any()


# --- trouble costs the sharing, not the run -------------------------------------------------------------------------


def test_a_full_disk_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(folder)
    cache.get("a", filler("a"))
    monkeypatch.setattr(blob_file, "FREE_BYTES_MIN", 1 << 60)
    cache.prepare({name: filler(name) for name in BLOBS})
    fill_all(cache)
    assert (cache.num_filled, cache.num_private) == (1, len(BLOBS) - 1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    monkeypatch.setattr(blob_file, "FREE_BYTES_MIN", 0)
    again = open_cache(folder)  # nothing half written
    fill_all(again)
    assert (again.num_mapped, again.num_filled) == (1, len(BLOBS) - 1)


def test_a_full_disk_at_the_first_blob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_file, "FREE_BYTES_MIN", 1 << 60)
    cache = open_cache(folder)
    fill_all(cache)  # the tensors are not each other's memory
    kept = {name: cache.get(name, filler(name)) for name in BLOBS}
    assert all(torch.equal(kept[name], content(name)) for name in BLOBS)


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = open_cache(tmp_path / "file" / "weights")
    fill_all(cache)
    assert not cache.is_shared and cache.path is None and cache.num_private == len(BLOBS)
    (record,) = caplog.records
    assert "weight_cache_dir" in record.getMessage() and str(tmp_path) in record.getMessage()


def test_a_read_only_folder_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a fault injected, since root may write everywhere."""
    real = os.open

    def read_only(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_CREAT and str(folder) in str(path):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    fill_all(open_cache(folder))
    (record,) = caplog.records
    assert "Read-only" in record.getMessage()


def test_what_others_may_write_to_is_not_trusted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    assert not open_cache(folder).is_shared
    assert "chmod go-w" in caplog.text


def test_a_link_or_another_users_file_is_not_mapped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = open_cache(folder).path
    assert path is not None
    other = folder.parent / "other"
    path.rename(other)
    path.symlink_to(other)
    assert not open_cache(folder).is_shared
    path.unlink()
    other.rename(path)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert not open_cache(folder).is_shared
    assert "another user" in caplog.text


def test_a_network_disk_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_folder, "_filesystem", lambda _device: "nfs4")
    assert not open_cache(folder).is_shared
    assert "lies on nfs4" in caplog.text


def test_a_stuck_packer_is_named_and_waited_for_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "FILL_TIMEOUT_S", 0.05)
    stuck, cache = open_cache(folder), open_cache(folder)
    assert stuck._file is not None
    assert all(stuck._file.try_lock(index) for index in range(len(BLOBS)))
    fill_all(cache)
    assert cache.num_private == len(BLOBS)
    (record,) = caplog.records
    assert str(cache.path) in record.getMessage()


def test_a_locked_folder_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "LOCK_TIMEOUT_S", 0.05)
    with cache_folder.CacheFolder.prepare(folder).locked(1):
        fill_all(open_cache(folder))
    (record,) = caplog.records
    assert str(folder / "lock") in record.getMessage()


def test_off_and_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_all(open_cache(None))
    monkeypatch.setattr(weight_cache, "SHARED_BYTES_MIN", sum(BLOBS.values()) + 1)
    fill_all(open_cache(folder))
    assert not folder.exists()


def test_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert EngineConfig().weight_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weight_cache_folder(None) == tmp_path / "switchgear" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weight_cache_folder(None) == tmp_path / "home" / ".cache" / "switchgear" / "weights"
    assert weight_cache_folder("") is None
    assert weight_cache_folder(str(tmp_path)) == tmp_path
