"""Runs traffic through a cluster of its own and keeps a load window for each batch of it: `record_traffic`.

A window is the requests of one batch from their first step to their last, so its counts depend on no clock: the same
traffic and model give the same counts by layer, expert and tenant again. Which source rank counted them may differ.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from switchgear.cluster import Cluster
from switchgear.config import split_settings
from switchgear.server.delta_stream import DeltaStream
from switchgear.server.frontend import Run
from switchgear.traces.traffic import TrafficRequest
from switchgear.traces.windowed_log import WindowedLog
from switchgear_runtime.errors import RankFailed
from switchgear_runtime.moe.load_window import LoadWindow
from switchgear_runtime.moe.routing_trace import RoutingTrace
from switchgear_runtime.sampling_params import SamplingParams

TEMPERATURE = 0.8
REPORT_TIMEOUT_S = 10.0  # for the ranks' last report, which comes when they park
_LOOK_S = 0.005
_READ_S = 30.0


def record_traffic(
    windows: Iterable[list[TrafficRequest]],
    *,
    description: str = "",
    tokens: bool = False,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> RoutingTrace:
    """A window per list of requests, which run together. `settings`: as the CLI's flags (see config.settings).
    `tokens`: keep each token's experts too, for which ranks on this host run their steps op by op."""
    given: dict[str, Any] = {"enable_prefix_caching": False, **settings}  # tokens found in a cache are routed nowhere
    with tempfile.TemporaryDirectory(prefix="switchgear-routing-") as folder:
        serve, engine = split_settings({**given, "routing_log": folder} if tokens else given)
        return asyncio.run(_record(Cluster(serve, engine), windows, description, progress))


async def _record(
    cluster: Cluster, windows: Iterable[list[TrafficRequest]], description: str, progress: Callable[[int], None] | None
) -> RoutingTrace:
    recorder = _Recorder(cluster)
    log = WindowedLog(cluster.engine.routing_log, cluster.config.ranks, cluster.spec)
    recorded: list[LoadWindow] = []
    try:
        await cluster.start()
        for requests in windows:
            recorded.append(await recorder.window(requests))
            log.end_window()
            if progress is not None:
                progress(len(recorded))
        tokens = log.tokens()
    finally:
        await cluster.stop(0)
    return RoutingTrace.of(
        recorded, top_k=cluster.spec.moe.top_k, model=cluster.model_name, description=description, tokens=tokens
    )


class _Recorder:
    def __init__(self, cluster: Cluster) -> None:
        self._core = cluster.core
        self._per_token = cluster.spec.num_moe_layers * cluster.spec.moe.top_k

    async def window(self, requests: list[TrafficRequest]) -> LoadWindow:
        load = self._core.load
        before = load.snapshot(time.monotonic())
        num_tokens = sum(await asyncio.gather(*map(self._run, requests)))
        expected = before.routed_SLE.sum() + num_tokens * self._per_token
        deadline_s = time.monotonic() + REPORT_TIMEOUT_S
        while (after := load.snapshot(time.monotonic())).routed_SLE.sum() < expected:
            if after.time_s > deadline_s:
                raise RankFailed(
                    f"the ranks reported {after.routed_SLE.sum() - before.routed_SLE.sum()} assignments of the "
                    f"{num_tokens * self._per_token} of a window within {REPORT_TIMEOUT_S:.0f} s"
                )
            await asyncio.sleep(_LOOK_S)
        return load.window(before, after)

    async def _run(self, request: TrafficRequest) -> int:
        """How many tokens it had routed: all but the last one drawn."""
        params = SamplingParams(
            temperature=TEMPERATURE, max_tokens=request.max_tokens, seed=request.seed, ignore_eos=True
        )
        admissions = self._core.check([request.prompt], params)
        stream = DeltaStream(len(admissions))
        admitted = self._core.admit(admissions, sink=stream.put, tenant=request.tenant)
        run = Run(core=self._core, request=admitted, stream=stream)
        num_tokens = 0
        while not run.done:
            for event in await run.read(_READ_S):
                if event.finish is not None:
                    if event.finish.error is not None:
                        raise event.finish.error
                    drawn = event.finish.num_output_tokens - 1 - event.finish.num_cached_tokens
                    num_tokens += event.finish.num_prompt_tokens + drawn
        return num_tokens
