"""What `switchgear top` shows: `Snapshot`, the metrics it reads, and `view`, the page made from two of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PREFIX = "switchgear:"
BAR_CHARS = 20
_SPARKS = "▁▂▃▄▅▆▇█"
SPARK_FULL = 2.0  # max/mean that fills a spark


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`values`: by metric name without prefix, then by the one label beside the model's ("" where there is none)."""

    at_s: float
    model: str
    values: dict[str, dict[str, float]]
    ready: str  # its state, or why not

    @classmethod
    def of(cls, metrics: str, ready: bytes, at_s: float) -> Snapshot:
        values: dict[str, dict[str, float]] = {}
        model = ""
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                labels = dict(sample.labels)
                model = labels.pop("model_name", model)
                if sample.name.startswith(PREFIX) and len(labels) <= 1:
                    values.setdefault(sample.name.removeprefix(PREFIX), {})["".join(labels.values())] = sample.value
        return cls(at_s, model, values, _ready(ready))

    def get(self, name: str, label: str = "") -> float:
        return self.values.get(name, {}).get(label, 0.0)

    def numbered(self, name: str) -> Iterator[tuple[str, float]]:
        """Those whose label is a number, in its order."""
        found = self.values.get(name, {})
        yield from sorted(
            ((key, value) for key, value in found.items() if key.isdecimal()), key=lambda one: int(one[0])
        )


def view(now: Snapshot, before: Snapshot | None, *, width: int = 100) -> RenderableType:
    """`before` gives the rates."""
    parts: list[RenderableType] = [_head(now, before), _ranks(now, before)]
    if layers := [value for _, value in now.numbered("placement_window_imbalance")]:
        parts.append(_layers(layers, width))
    if now.values.get("placement_hot_expert_tokens"):
        parts.append(_hottest(now))
    parts.append(_placement(now))
    return Group(*parts)


def _head(now: Snapshot, before: Snapshot | None) -> Text:
    text = Text()
    text.append(now.model or "switchgear", style="bold")
    text.append(f"  {now.ready}", style="green" if now.ready == "ready" else "bold red")
    text.append(f"  generation {now.get('generation'):.0f}  epoch {now.get('epoch'):.0f}")
    text.append(f"  {_rate(now, before, 'generation_tokens_total'):.0f} tokens/s out")
    text.append(f"  {_rate(now, before, 'prompt_tokens_total'):.0f} tokens/s in\n")
    return text


def _ranks(now: Snapshot, before: Snapshot | None) -> Table:
    table = Table(pad_edge=False, box=None)
    for name in ("rank", "running", "waiting", "KV", "rows/s", "rows of the last window"):
        table.add_column(name, justify="left" if name.endswith("window") else "right")
    rows = dict(now.numbered("placement_window_rows"))
    most = max(rows.values(), default=0.0)
    for rank, running in now.numbered("num_requests_running"):
        share = rows.get(rank, 0.0) / most if most else 0.0
        table.add_row(
            rank,
            f"{running:.0f}",
            f"{now.get('num_requests_waiting', rank):.0f}",
            f"{now.get('kv_cache_usage_perc', rank):.0%}",
            f"{_rate(now, before, 'expert_rows_total', rank):.0f}",
            Text("█" * round(share * BAR_CHARS), style="cyan").append(f" {rows.get(rank, 0.0):.0f}", style="default"),
        )
    return table


def _layers(imbalance: list[float], width: int) -> Text:
    """A spark a layer, full at SPARK_FULL."""
    text = Text("\nmax/mean by layer  ")
    for value in imbalance[: max(8, width - 40)]:
        level = min(len(_SPARKS) - 1, int((value - 1.0) / (SPARK_FULL - 1.0) * len(_SPARKS)))
        text.append(_SPARKS[max(0, level)], style="red" if value >= SPARK_FULL else "green")
    return text.append(f"  worst {max(imbalance):.2f}, mean {sum(imbalance) / len(imbalance):.2f}\n")


def _hottest(now: Snapshot) -> Text:
    text = Text("hottest experts    ")
    for place, tokens in now.numbered("placement_hot_expert_tokens"):
        layer, expert = now.get("placement_hot_expert_layer", place), now.get("placement_hot_expert_expert", place)
        text.append(f"{layer:.0f}:{expert:.0f}", style="bold").append(f" {tokens:.0f}  ")
    return text.append("\n")


def _placement(now: Snapshot) -> Text:
    text = Text("placement          ")
    if now.get("placement_alarm"):
        text.append("ALARM  ", style="bold red")
    if now.get("placement_migrating"):
        text.append("migrating  ", style="yellow")
    if version := now.get("placement_model_version"):
        text.append(f"model version {version:.0f}", style="bold")
        text.append(f" ({live:.0f} live swaps)  " if (live := now.get("placement_live_swaps")) else "  ")
    committed = now.get("placement_migrations_total", "committed")
    text.append(f"{now.get('placement_plans_total'):.0f} plans, {committed:.0f} committed, ")
    text.append(f"{now.get('placement_migrated_experts_total'):.0f} experts, ")
    text.append(f"{now.get('placement_migrated_bytes_total') / 2**20:.1f} MiB moved")
    if "placement_plan_age_seconds" in now.values:
        text.append(f", the last {now.get('placement_plan_age_seconds'):.0f} s ago")
    return text


def _rate(now: Snapshot, before: Snapshot | None, name: str, label: str = "") -> float:
    if before is None or now.at_s <= before.at_s:
        return 0.0
    return max(0.0, now.get(name, label) - before.get(name, label)) / (now.at_s - before.at_s)


def _ready(body: bytes) -> str:
    try:
        answer = msgspec.json.decode(body, type=dict[str, object])
    except msgspec.DecodeError:
        return "no answer from /ready"
    if isinstance(error := answer.get("error"), dict):
        return f"not ready: {error.get('message')}"
    status = str(answer.get("status", "unknown"))
    return f"{status}: {answer['placement']}" if "placement" in answer else status
