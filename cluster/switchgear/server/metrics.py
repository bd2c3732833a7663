"""/metrics in Prometheus' format: `Metrics`. Names are vLLM's but for the prefix, so that its dashboards fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from switchgear.server.core import ServerCore
from switchgear.server.events import FinishReason

PREFIX = "switchgear:"
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_FIRST_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5.0, 10.0, 20.0, 40.0)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Metrics:
    """The core's Observer. Its registry is its own: two servers in one process do not meet."""

    def __init__(self, core: ServerCore, model_name: str) -> None:
        self._registry = CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, text: str, extra: Iterable[str] = ()) -> Counter:
            return Counter(PREFIX + name, text, [*labels, *extra], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, text, labels, registry=self._registry, buckets=buckets)
            return made.labels(model_name)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens accepted.").labels(model_name)
        self._output_tokens = counter("generation_tokens", "Tokens generated.").labels(model_name)
        finished = counter("request_success", "Sequences ended, by reason.", ["finished_reason"])
        reasons: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
        self._finished = {reason: finished.labels(model_name, reason) for reason in reasons}
        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_BUCKETS_S)
        self._next_token = histogram("inter_token_latency_seconds", "Token to token.", _TOKEN_BUCKETS_S)
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_BUCKETS_S)
        self._registry.register(_CoreCollector(core, model_name))

    def accepted(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def token(self, since_arrival_s: float, since_token_s: float | None) -> None:
        self._output_tokens.inc()
        if since_token_s is None:
            self._first_token.observe(since_arrival_s)
        else:
            self._next_token.observe(since_token_s)

    def finished(self, reason: FinishReason, since_arrival_s: float) -> None:
        self._finished[reason].inc()
        self._whole.observe(since_arrival_s)

    def add(self, collector: Collector) -> None:
        """One more that is read at scrape time."""
        self._registry.register(collector)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _CoreCollector:
    """What is read off the core at scrape time. Series grow with ranks and layers, never with experts or requests."""

    def __init__(self, core: ServerCore, model_name: str) -> None:
        self._core = core
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        core = self._core
        states = core.ranks.states()
        yield self._gauge(
            "num_requests_running", "Sequences running, by rank.", {s.rank: s.stats.num_running for s in states}
        )
        waiting = {s.rank: max(0, s.num_sequences - s.stats.num_running) for s in states}
        yield self._gauge(
            "num_requests_waiting",
            "Sequences waiting, by rank; rank none: those that have no rank yet.",
            waiting | {"none": len(core.waiting)},
        )
        used = {s.rank: 1 - s.stats.num_free_blocks / (s.stats.num_total_blocks or 1) for s in states}
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of KV-cache blocks in use, by rank; 1 is full.",
            {s.rank: used[s.rank] if s.stats.num_total_blocks else 0.0 for s in states},
        )
        for name, text, values in (
            ("num_preemptions", "Preemptions.", {s.rank: s.stats.num_preemptions for s in states}),
            ("prefix_cache_queries", "Prompt tokens.", {s.rank: s.stats.prefix_cache_query_tokens for s in states}),
            ("prefix_cache_hits", "Prompt tokens found.", {s.rank: s.stats.prefix_cache_hit_tokens for s in states}),
        ):
            yield self._counter(name, text, values)
        rows_RLE = core.load.rows()
        rows_RL = [[sum(layer) for layer in rank] for rank in rows_RLE]
        yield self._counter(
            "expert_rows", "Token rows computed by a rank's experts.", dict(enumerate(map(sum, rows_RL)))
        )
        balance = GaugeMetricFamily(
            PREFIX + "expert_balancedness",
            "Mean over max of the ranks' rows, by MoE layer.",
            labels=["model_name", "layer"],
        )
        for layer, rows in enumerate(zip(*rows_RL, strict=True)):
            even = sum(rows) / len(rows) / max(rows) if any(rows) else 1.0
            balance.add_metric([self._model_name, str(layer)], even)
        yield balance
        carried = CounterMetricFamily(
            PREFIX + "sequences_carried", "Sequences that went on with another rank.", labels=["model_name"]
        )
        carried.add_metric([self._model_name], core.num_carried)
        yield carried
        for name, text, value in (
            ("ready", "1 if requests are taken.", int(core.ready)),
            ("ranks_serving", "Ranks that take requests.", core.ranks.num_serving),
            ("generation", "Number of the current group of ranks.", core.generation),
            ("epoch", "Version of the expert map.", core.epoch),
        ):
            family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _gauge(self, name: str, text: str, by_rank: Mapping[Any, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", "rank"])
        for rank, value in by_rank.items():
            family.add_metric([self._model_name, str(rank)], value)
        return family

    def _counter(self, name: str, text: str, by_rank: Mapping[int, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", "rank"])
        for rank, value in by_rank.items():
            family.add_metric([self._model_name, str(rank)], value)
        return family
