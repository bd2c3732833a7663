"""`switchgear record`: traffic drifts as its seed says, and a recording counts every token of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from switchgear.cli import main
from switchgear.config import bundled_model
from switchgear.tokenizer import Tokenizer
from switchgear.traces.traffic import DriftingTraffic, TrafficRequest
from switchgear.traces.traffic_prompts import PIECE_CHARS, TENANT_OF_DOMAIN, prompts_in, traffic_prompts
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.routing_trace import RoutingTrace


def make_traffic(seed: int, num_requests: int = 50) -> DriftingTraffic:
    return DriftingTraffic(traffic_prompts(), TENANT_OF_DOMAIN, num_requests=num_requests, seed=seed)


def domains_of(window: list[TrafficRequest]) -> dict[str, int]:
    return {domain: sum(request.domain == domain for request in window) for domain in TENANT_OF_DOMAIN}


def test_traffic_is_a_function_of_its_seed_and_drifts() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    windows = list(make_traffic(seed).windows(300))
    assert windows == list(make_traffic(seed).windows(300)), f"seed {seed}"
    assert all(request.tenant == TENANT_OF_DOMAIN[request.domain] for window in windows for request in window)
    leading = {max(counts, key=lambda domain: counts[domain]) for counts in map(domains_of, windows)}
    assert len(leading) >= 4, f"seed {seed}: only {leading} ever led"


def test_prompts_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one per domain"):
        prompts_in(tmp_path)
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    (tmp_path / "b.txt").write_text("x" * 5000 + "\n")
    prompts = prompts_in(tmp_path)
    assert list(prompts) == ["a", "b"]
    assert all(PIECE_CHARS <= len(piece) <= 2 * PIECE_CHARS for pieces in prompts.values() for piece in pieces)
    (tmp_path / "c.txt").write_text("short\n")
    with pytest.raises(ConfigError, match=r"c\.txt is shorter"):
        prompts_in(tmp_path)


def test_a_recording_counts_every_token(tmp_path: Path) -> None:
    paths = [tmp_path / "one.npz", tmp_path / "two.npz"]
    flags = [
        "--windows",
        "3",
        "--requests",
        "6",
        "--traffic-seed",
        "5",
        "--launcher",
        "local",
        "--log-level",
        "warning",
    ]
    assert main(["record", str(paths[0]), *flags, "--ranks", "1"]) == 0
    assert main(["record", str(paths[1]), *flags, "--ranks", "2", "--tokens"]) == 0
    one, two = map(RoutingTrace.load, paths)
    assert one.tokens is None
    assert two.tokens is not None  # `load` has compared them with the counts
    assert two.tokens.num_tokens_WS.sum() * 16 == two.routed_WLE.sum()
    assert (one.header.num_sources, two.header.num_sources, one.header.top_k) == (1, 2, 4)
    assert np.array_equal(one.routed_WLE, two.routed_WLE)  # the same bits wherever the experts are
    tokenizer = Tokenizer.load(bundled_model())
    assert tokenizer is not None
    for requests, window in zip(make_traffic(5, 6).windows(3), two, strict=True):
        lengths = [len(tokenizer.encode(request.prompt)) + request.max_tokens - 1 for request in requests]
        assert (window.routed_LE.sum(axis=1) == 4 * sum(lengths)).all()
        assert window.begin_step < window.end_step
        by_tenant = {
            tenant: 16 * sum(n for n, request in zip(lengths, requests, strict=True) if request.tenant == tenant)
            for tenant in set(TENANT_OF_DOMAIN.values())
        }
        assert {tenant: window.tenant(tenant).sum() for tenant in by_tenant} == by_tenant
        assert np.array_equal(window.routed_NLE.sum(axis=0), window.routed_LE)
    assert all(before.end_step <= after.begin_step for before, after in zip(two.windows, two.windows[1:], strict=False))


def test_bad_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output, arguments, what in (
        ("x.npz", ["--windows", "0"], "--windows 0 must be 1 or more"),
        ("x.npz", ["--url", "http://127.0.0.1:1", "--tokens"], "--tokens needs ranks of its own"),
        ("no/x.npz", [], "must be a file in a folder that exists"),
    ):
        assert main(["record", str(tmp_path / output), *arguments]) == 2
        assert what in capsys.readouterr().err
