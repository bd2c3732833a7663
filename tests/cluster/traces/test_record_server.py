"""Recording a running server: windows are differences of its sums, and idle time is no window."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_process import start_server, stop_server

from switchgear import Client, SamplingParams
from switchgear.cli import main
from switchgear.outputs import ExpertLoad
from switchgear.traces.server_recorder import record_server
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace


def make_load(by_source: list[list[list[int]]], by_tenant: dict[str, list[list[int]]], step: int) -> ExpertLoad:
    routed = [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*by_source, strict=True)]
    return ExpertLoad(
        num_layers=1,
        num_experts=2,
        generation=1,
        epoch=0,
        routed=routed or [[0, 0]],
        rows=by_source,
        routed_by_source=by_source,
        routed_by_tenant=by_tenant,
        step=step,
        top_k=1,
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def record(loads: list[ExpertLoad], num_windows: int) -> list[LoadWindow]:
    clock = Clock()
    answers: Iterator[ExpertLoad] = iter(loads)
    return record_server(
        lambda: next(answers), num_windows=num_windows, window_s=2.0, now_s=lambda: clock.now_s, sleep=clock.sleep
    )


def test_windows_are_differences_and_idle_time_is_none() -> None:
    windows = record(
        [
            make_load([[[3, 1]]], {}, 4),
            make_load([[[5, 1]], [[0, 9]]], {"": [[3, 10]], "a": [[2, 0]]}, 9),
            make_load([[[5, 1]], [[0, 9]]], {"": [[3, 10]], "a": [[2, 0]]}, 9),
            make_load([[[5, 2]], [[0, 9]]], {"": [[3, 10]], "a": [[2, 1]]}, 12),
        ],
        2,
    )
    assert [(window.begin_step, window.end_step, window.seconds) for window in windows] == [(4, 9, 2.0), (9, 12, 2.0)]
    assert windows[0].routed_SLE.tolist() == [[[2, 0]], [[0, 9]]]
    assert (windows[0].tenant("").tolist(), windows[0].tenant("a").tolist()) == ([[0, 9]], [[2, 0]])
    assert (windows[1].tenant("").tolist(), windows[1].tenant("a").tolist()) == ([[0, 0]], [[0, 1]])


def test_a_server_that_was_started_anew_is_an_error() -> None:
    with pytest.raises(RankFailed, match="started anew"):
        record([make_load([[[3, 1]]], {}, 4), make_load([[[1, 1]]], {}, 1)], 1)


def test_a_real_server(tmp_path: Path) -> None:
    process, url = start_server("--ranks", "1", "--log-level", "warning")
    done = threading.Event()

    def send() -> None:
        with Client(url) as client:
            while not done.is_set():
                client.generate(["harbor (noun):"] * 4, SamplingParams(max_tokens=30), use_tqdm=False)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        output = tmp_path / "trace.npz"
        assert main(["record", str(output), "--url", url, "--windows", "2", "--window-s", "1"]) == 0
    finally:
        done.set()
        sender.join(30)
        stop_server(process)
    trace = RoutingTrace.load(output)
    assert (trace.header.model, trace.header.top_k, len(trace)) == ("tiny-moe", 4, 2)
    for window in trace:
        sums_L = window.routed_LE.sum(axis=1)
        assert (sums_L == sums_L[0]).all() and sums_L[0] % 4 == 0 and sums_L[0] > 0
