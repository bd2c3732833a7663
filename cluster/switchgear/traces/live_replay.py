"""A routing trace through live ranks: `replay_live` sends each window's load to a cluster under forced routing.

The cluster has `forced_routing` set to the same trace, so a request whose seed is the window's number (plus a multiple
of the number of windows) is routed as that window was. What comes back is compared with the trace, so a server without
forced routing, or with another trace, is noticed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from switchgear.outputs import ExpertLoad, RequestOutput
from switchgear.traces.replay import imbalance
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.moe.routing_trace import RoutingTrace
from switchgear_runtime.sampling_params import SamplingParams

REPORT_TIMEOUT_S = 10.0
_LOOK_S = 0.01
_PROMPT_IDS = 64  # which they are does not matter: routing is forced
_SEEDS_MAX = 1 << 63


class Target(Protocol):
    """`LLM` and `Client` are."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[SamplingParams], use_tqdm: bool = ...
    ) -> list[RequestOutput]: ...

    def expert_load(self) -> ExpertLoad: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveWindow:
    """`distance`: half the absolute difference between the shares of load that came out and the trace's, mean over
    layers; 0 is the same load, 1 none in common. `imbalance`: of the rows that ranks computed, as ReplayedWindow's."""

    window: int
    num_tokens: int
    seconds: float
    distance: float
    imbalance: float
    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReplay:
    """`tokens_digest`: of all output tokens; the same for any ranks, placement and policy."""

    windows: list[LiveWindow]
    tokens_digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Of one window."""

    num_requests: int = 32
    num_prompt_tokens: int = 32
    num_output_tokens: int = 16

    def prompts(self) -> list[list[int]]:
        return [[1 + (i + j) % _PROMPT_IDS for j in range(self.num_prompt_tokens)] for i in range(self.num_requests)]

    def params(self, window: int, num_windows: int) -> list[SamplingParams]:
        return [
            SamplingParams(
                temperature=0.0,
                max_tokens=self.num_output_tokens,
                ignore_eos=True,
                seed=(window + num_windows * i) % _SEEDS_MAX,
            )
            for i in range(self.num_requests)
        ]

    @property
    def num_tokens(self) -> int:
        """That are routed: all but the last one drawn of each."""
        return self.num_requests * (self.num_prompt_tokens + self.num_output_tokens - 1)


def replay_live(
    target: Target,
    trace: RoutingTrace,
    requests: Requests,
    *,
    num_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> LiveReplay:
    """The first `num_windows` of the trace, one after the other. Nobody else may use the cluster meanwhile."""
    digest = hashlib.sha256()
    windows = []
    before = target.expert_load()
    for window in range(min(num_windows or len(trace), len(trace))):
        start_s = time.monotonic()
        outputs = target.generate(requests.prompts(), requests.params(window, len(trace)), use_tqdm=False)
        seconds = time.monotonic() - start_s
        digest.update(repr([output.outputs[0].token_ids for output in outputs]).encode())
        after = _reported(target, before, requests.num_tokens * trace.header.top_k)
        windows.append(
            LiveWindow(
                window=window,
                num_tokens=requests.num_tokens,
                seconds=seconds,
                distance=distance(np.array(after.routed) - np.array(before.routed), trace.windows[window].routed_LE),
                imbalance=_imbalance(before, after),
                epoch=after.epoch,
            )
        )
        before = after
        if progress is not None:
            progress(window + 1)
    return LiveReplay(windows=windows, tokens_digest=digest.hexdigest()[:16])


def distance(actual_LE: NDArray[np.int64], expected_LE: NDArray[np.int64]) -> float:
    """Total variation of the experts' shares, mean over layers that have load in both."""
    here_L = (actual_LE.sum(axis=1) > 0) & (expected_LE.sum(axis=1) > 0)
    if not here_L.any():
        return 1.0
    shares = [counts_LE[here_L] / counts_LE[here_L].sum(axis=1)[:, None] for counts_LE in (actual_LE, expected_LE)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)


def _reported(target: Target, before: ExpertLoad, num_assignments: int) -> ExpertLoad:
    """The load once every layer's tokens are in it; ranks report when they park. A preempted sequence counts again."""
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    routed_before = _layer_sums(before)
    while True:
        after = target.expert_load()
        rows_L = np.array(after.rows).sum(axis=(0, 2)) if after.rows else np.zeros(0)
        routed_L = _layer_sums(after)
        if (routed_L - routed_before >= num_assignments).all() and np.array_equal(rows_L, routed_L):
            return after
        if time.monotonic() > deadline_s:
            raise RankFailed(
                f"the ranks reported {int((routed_L - routed_before).min())} of {num_assignments} assignments of a "
                f"window within {REPORT_TIMEOUT_S:.0f} s"
            )
        time.sleep(_LOOK_S)


def _layer_sums(load: ExpertLoad) -> NDArray[np.int64]:
    sums_L: NDArray[np.int64] = np.array(load.routed, np.int64).sum(axis=1)
    return sums_L


def _imbalance(before: ExpertLoad, after: ExpertLoad) -> float:
    rows_RLE = np.array(after.rows, np.float64)
    if before.rows:
        rows_RLE[: len(before.rows)] -= np.array(before.rows)
    return imbalance(rows_RLE.sum(axis=2).T)
