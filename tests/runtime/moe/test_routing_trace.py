"""Routing traces: what is written comes back, and what is no trace is refused."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace, TokenRoutes


def random_window(rng: np.random.Generator, num_layers: int, num_experts: int, begin_step: int) -> LoadWindow:
    tenants = tuple(str(name) for name in rng.permutation(["a", "b", "c"])[: rng.integers(0, 4)])
    return LoadWindow(
        begin_step=begin_step,
        end_step=begin_step + int(rng.integers(1, 10)),
        seconds=float(rng.random()),
        routed_SLE=rng.integers(0, 1000, (int(rng.integers(1, 4)), num_layers, num_experts)),
        tenants=tenants,
        routed_NLE=rng.integers(0, 1000, (len(tenants), num_layers, num_experts)),
    )


def random_windows(seed: int) -> list[LoadWindow]:
    rng = np.random.default_rng(seed)
    num_layers, num_experts = (int(value) for value in rng.integers(1, 6, 2))
    return [random_window(rng, num_layers, num_experts, 10 * i) for i in range(int(rng.integers(1, 6)))]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for _ in range(20):
        seed = random.SystemRandom().randrange(1 << 30)
        windows = random_windows(seed)
        trace = RoutingTrace.of(windows, top_k=2, model="m", description="d")
        trace.save(tmp_path / "a.npz")
        trace.save(tmp_path / "b.npz")
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes(), f"seed {seed}"
        loaded = RoutingTrace.load(tmp_path / "a.npz")
        assert loaded.header == trace.header, f"seed {seed}"
        assert len(loaded) == len(windows)
        for before, after in zip(windows, loaded, strict=True):
            assert (before.begin_step, before.end_step, before.seconds) == (
                after.begin_step,
                after.end_step,
                after.seconds,
            )
            assert np.array_equal(before.routed_LE, after.routed_LE), f"seed {seed}"
            assert after.routed_SLE.shape[0] == trace.header.num_sources
            for name in trace.header.tenants:
                assert np.array_equal(before.tenant(name), after.tenant(name)), f"seed {seed}"
        assert np.array_equal(loaded.routed_WLE, np.stack([window.routed_LE for window in windows])), f"seed {seed}"


def test_windows_join() -> None:
    for _ in range(20):
        seed = random.SystemRandom().randrange(1 << 30)
        windows = random_windows(seed)
        joined = LoadWindow.joined(windows)
        assert (joined.begin_step, joined.end_step) == (windows[0].begin_step, windows[-1].end_step)
        assert joined.num_assignments == sum(window.num_assignments for window in windows), f"seed {seed}"
        for name in ("a", "b", "c"):
            expected = sum(window.tenant(name) for window in windows)
            assert np.array_equal(joined.tenant(name), expected), f"seed {seed}"
    with pytest.raises(ConfigError, match="at least one"):
        LoadWindow.joined([])


def test_no_trace_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(ConfigError, match="cannot be read"):
        RoutingTrace.load(path)
    for data in (b"", b"PK", b"x" * 100):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="damaged"):
            RoutingTrace.load(path)
    RoutingTrace.of(random_windows(7), top_k=1).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    for name, value, what in (
        ("routed_WSLE", np.zeros((1, 1, 1, 1), np.uint32), "routed_WSLE"),
        ("seconds_W", np.array(["a"] * len(arrays["seconds_W"])), "seconds_W"),
        ("header", np.frombuffer(b"{}", np.uint8), "damaged"),
        (
            "header",
            np.frombuffer(arrays["header"].tobytes().replace(b'"version":1', b'"version":9'), np.uint8),
            "version 9",
        ),
    ):
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(ConfigError, match=what):
            RoutingTrace.load(path)
    del arrays["routed_WNLE"]
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match="damaged"):
        RoutingTrace.load(path)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.npy", b"0" * (1 << 20))
    monkeypatch.setattr("switchgear_runtime.moe.routing_trace.BYTES_MAX", 1 << 19)
    with pytest.raises(ConfigError, match="unpacks to 1048576 bytes"):
        RoutingTrace.load(path)


def test_counts_beyond_the_format_are_refused(tmp_path: Path) -> None:
    window = LoadWindow(begin_step=0, end_step=1, routed_SLE=np.full((1, 1, 1), 1 << 32))
    with pytest.raises(ConfigError, match="shorter"):
        RoutingTrace.of([window], top_k=1).save(tmp_path / "trace.npz")


def token_trace(seed: int) -> RoutingTrace:
    """Two layers, 5 experts, top-2; three windows of two sources, some without a token."""
    rng = np.random.default_rng(seed)
    num_tokens_WS = rng.integers(0, 4, (3, 2))
    ids_TLK = np.argsort(rng.random((int(num_tokens_WS.sum()), 2, 5)), axis=2)[:, :, :2].astype(np.uint16)
    windows, end = [], 0
    for i in range(3):
        routed_SLE = np.zeros((2, 2, 5), np.int64)
        for source in range(2):
            begin, end = end, end + int(num_tokens_WS[i, source])
            for layer in range(2):
                routed_SLE[source, layer] = np.bincount(ids_TLK[begin:end, layer].reshape(-1), minlength=5)
        windows.append(LoadWindow(begin_step=i, end_step=i + 1, routed_SLE=routed_SLE))
    tokens = TokenRoutes(num_tokens_WS=num_tokens_WS, topk_ids_TLK=ids_TLK)
    return RoutingTrace.of(windows, top_k=2, tokens=tokens)


def test_each_tokens_experts_come_back(tmp_path: Path) -> None:
    for _ in range(20):
        seed = random.SystemRandom().randrange(1 << 30)
        trace = token_trace(seed)
        trace.save(tmp_path / "trace.npz")
        loaded = RoutingTrace.load(tmp_path / "trace.npz")
        assert trace.tokens is not None
        assert loaded.tokens is not None
        assert np.array_equal(loaded.tokens.topk_ids_TLK, trace.tokens.topk_ids_TLK), f"seed {seed}"
        for window in range(3):
            ids_TLK = loaded.tokens.of_window(window)
            assert len(ids_TLK) == trace.tokens.num_tokens_WS[window].sum()
            counts = [np.bincount(ids_TLK[:, layer].reshape(-1), minlength=5) for layer in range(2)]
            assert np.array_equal(counts, loaded.windows[window].routed_LE), f"seed {seed}"


def test_tokens_that_are_not_the_counted_ones_are_refused() -> None:
    trace = token_trace(11)
    assert trace.tokens is not None
    sizes, ids_TLK = trace.tokens.num_tokens_WS, trace.tokens.topk_ids_TLK
    other = ids_TLK.copy()
    other[0, 0] = (ids_TLK[0, 0] + 1) % 5
    twice = ids_TLK.copy()
    twice[0, 0] = 3
    for changed_sizes, changed_ids, what in (
        (sizes, other, "tokens and counts differ"),
        (sizes, twice, "or one twice"),
        (sizes, ids_TLK + np.uint16(5), "beyond 4"),
        (sizes, ids_TLK[1:], "not "),
        (sizes[:2], ids_TLK, "not "),
    ):
        tokens = TokenRoutes(num_tokens_WS=changed_sizes, topk_ids_TLK=changed_ids)
        with pytest.raises(ConfigError, match=what):
            RoutingTrace.of(trace.windows, top_k=2, tokens=tokens)
