"""Placement in /metrics: `PlacementCollector`, read off the controller at scrape time.

Series grow with ranks and layers, never with experts: the hottest experts are named by place (0 is the hottest), with
layer, expert and tokens as values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from switchgear.placement.controller import PlacementController
from switchgear.placement.observer import Window
from switchgear.placement.report import status_of

PREFIX = "switchgear:placement_"


class PlacementCollector(Collector):
    def __init__(self, controller: PlacementController, model_name: str) -> None:
        self._controller = controller
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        controller = self._controller
        status = status_of(controller, with_map=False)
        gauges = {
            "alarm": ("1 if placement is stuck; /ready says why.", float(status.alarm is not None)),
            "plan_seconds": ("What the latest plan took.", status.plan_s),
            "steps_since_commit": ("Steps since a map was last committed.", float(status.steps_since_commit)),
            "hold_windows": ("Windows still to pass without a move.", float(status.hold_windows)),
            "migrating": ("1 while experts move.", float(status.migration is not None)),
            "model_version": (
                "Of the model, that new sequences get; 0 is the checkpoint.",
                float(status.model_version),
            ),
            "live_swaps": (
                "Experts loaded from files whose weights before some running sequence may need.",
                float(sum(not swap.settled for swap in status.swaps)),
            ),
        }
        if status.plan_age_s is not None:
            gauges["plan_age_seconds"] = ("Since a map was last committed.", status.plan_age_s)
        if status.byte_budget is not None:
            gauges["budget_bytes"] = ("Bytes that may move now.", float(status.byte_budget))
        for name, (text, value) in gauges.items():
            yield self._gauge(name, text, None, {"": value})
        counters = {
            "plans": ("Plans made.", status.plans),
            "migrated_experts": ("Experts of committed migrations.", status.migrated_experts),
            "migrated_bytes": ("Bytes of committed migrations.", status.migrated_bytes),
            "planner_restarts": ("Planners that died or hung.", status.planner_restarts),
            "regretted_plans": ("Plans that the next window proved wrong.", status.regretted_plans),
            "stall_seconds": ("Seconds in which a decision was overdue.", status.stalled_s),
        }
        for name, (text, count) in counters.items():
            yield self._counter(name, text, None, {"": count})
        yield self._counter("migrations", "Migrations, by how they ended.", "result", status.migrations)
        if controller.windows:
            yield from self._window(controller.windows[-1])

    def _window(self, window: Window) -> Iterable[Metric]:
        rows_R = window.rows_RL.sum(axis=1).tolist()
        yield self._gauge("window_rows", "Rows by rank in the last window.", "rank", _numbered(rows_R))
        yield self._gauge(
            "window_imbalance",
            "Max over mean of the ranks' rows in the last window, by MoE layer.",
            "layer",
            _numbered(window.imbalance_L.tolist()),
        )
        hottest = window.hottest()
        for index, (name, text) in enumerate(
            (("layer", "Layer"), ("expert", "Number within its layer"), ("tokens", "Tokens in the last window"))
        ):
            values = _numbered([one[index] for one in hottest])
            yield self._gauge(f"hot_expert_{name}", f"{text} of the hottest experts, by place.", "place", values)

    def _gauge(self, name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=_labels(label))
        for key, value in values.items():
            family.add_metric([self._model_name, *([key] if label else [])], value)
        return family

    def _counter(self, name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=_labels(label))
        for key, value in values.items():
            family.add_metric([self._model_name, *([key] if label else [])], value)
        return family


def _labels(label: str | None) -> list[str]:
    return ["model_name", *([label] if label else [])]


def _numbered(values: list[float] | list[int]) -> dict[str, float]:
    return {str(index): float(value) for index, value in enumerate(values)}
