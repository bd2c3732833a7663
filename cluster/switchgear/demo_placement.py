"""The demo's second part: traffic of one kind makes a few experts hot, and the placement follows while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchgear import Client, SamplingParams
from switchgear.admin_client import AdminClient
from switchgear.byte_size import format_bytes
from switchgear.demo_prompts import PROMPTS_BY_DOMAIN
from switchgear.outputs import ExpertLoad
from switchgear_runtime.moe.expert_map import ExpertMap

KIND = "dictionary"
COPIES = 4  # of each prompt in a batch
WINDOW_S = 3.0  # of the demo's server; by default it is longer
# Lending levels a batch by itself, step for step; without it one sees what the placement does.
OPTIONS = ("--placement-window-s", str(WINDOW_S), "--lending", "0")
FOLLOW_TIMEOUT_S = 60.0
LOAD_REPORT_S = 0.3  # ranks report what their experts did when they park, moments after the last token
BAR_CHARS = 40
EXPERTS_SHOWN = 8

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of the skewed traffic. `rows_RLE`: computed for it, by rank, layer and expert."""

    tokens: list[list[int]]
    rows_RLE: Int64
    epoch: int
    expert_map: ExpertMap


def prompts() -> list[str]:
    return [*PROMPTS_BY_DOMAIN[KIND]] * COPIES


def follow_the_load(console: Console, client: Client, admin: AdminClient, params: SamplingParams) -> list[Batch]:
    """Skewed batches until one ran wholly after a migration; the first and the last of them."""
    console.print(
        f"\nNow traffic of one kind: {len(prompts())} prompts ({KIND!r}) in a batch, again and again. Load is counted in "
        f"windows of {WINDOW_S:g} s."
    )
    deadline_s = time.monotonic() + FOLLOW_TIMEOUT_S
    before = None
    while time.monotonic() < deadline_s:
        batch = _run(client, admin, params)
        if batch is None:  # the map changed meanwhile
            continue
        before = before or batch
        if batch.epoch > before.epoch:
            _show(console, admin, before, batch)
            return [before, batch]
    raise SystemExit(f"no expert moved within {FOLLOW_TIMEOUT_S:g} s: {admin.placement().last_reason}")


def _run(client: Client, admin: AdminClient, params: SamplingParams) -> Batch | None:
    begin = client.expert_load()
    outputs = client.generate(prompts(), params, use_tqdm=False)
    time.sleep(LOAD_REPORT_S)
    end, status = client.expert_load(), admin.placement()
    if not begin.epoch == end.epoch == status.epoch or status.expert_map is None:
        return None
    return Batch(
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        rows_RLE=_rows(end) - _rows(begin),
        epoch=end.epoch,
        expert_map=ExpertMap.from_json(status.expert_map),
    )


def _rows(load: ExpertLoad) -> Int64:
    return np.array(load.rows, np.int64)


def _show(console: Console, admin: AdminClient, before: Batch, after: Batch) -> None:
    layer = int(_imbalance_L(before).argmax())
    console.print(_table(before, layer, f"Before (epoch {before.epoch}): rows of layer {layer}"))
    status = admin.placement()
    console.print(
        f"The controller: {status.last_reason}\n{status.migrated_experts} experts "
        f"({format_bytes(status.migrated_bytes)}) moved while requests ran. In layer {layer}:"
    )
    for line in _moves(before.expert_map, after.expert_map, layer):
        console.print(f"  {line}")
    console.print(_table(after, layer, f"After (epoch {after.epoch}): the same prompts, the same layer"))
    console.print(
        f"Max over mean of the ranks' rows, all layers: {_imbalance_L(before).mean():.2f} before, "
        f"{_imbalance_L(after).mean():.2f} after (1.00 is even)."
    )


def _imbalance_L(batch: Batch) -> NDArray[np.float64]:
    rows_RL = batch.rows_RLE.sum(axis=2)
    imbalance_L: NDArray[np.float64] = rows_RL.max(axis=0) / np.maximum(rows_RL.mean(axis=0), 1)
    return imbalance_L


def _table(batch: Batch, layer: int, title: str) -> Table:
    rows_RE = batch.rows_RLE[:, layer]
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("rank", "rows", "", "its hottest experts (rows)"):
        table.add_column(name, justify="right" if name in ("rank", "rows") else "left")
    most = max(1, int(rows_RE.sum(axis=1).max()))
    for rank, rows_E in enumerate(rows_RE):
        total = int(rows_E.sum())
        hottest = [int(expert) for expert in np.argsort(-rows_E, kind="stable")[:EXPERTS_SHOWN] if rows_E[expert]]
        text = Text(" ").join(Text(f"{expert}", style="bold") + Text(f" ({rows_E[expert]})") for expert in hottest)
        table.add_row(str(rank), str(total), Text("█" * round(total / most * BAR_CHARS), style="cyan"), text)
    return table


def _moves(before: ExpertMap, after: ExpertMap, layer: int) -> list[str]:
    """What changed for each expert of the layer, in words."""
    lines = []
    for expert in range(before.num_experts):
        old = {slot // before.slots_per_rank for slot in before.replicas(layer, expert)}
        new = {slot // after.slots_per_rank for slot in after.replicas(layer, expert)}
        if old < new:
            lines.append(f"expert {expert} of rank {_ranks(old)} is replicated on rank {_ranks(new - old)}")
        elif new < old:
            lines.append(f"expert {expert} leaves rank {_ranks(old - new)}")
        elif old != new:
            lines.append(f"expert {expert} moves from rank {_ranks(old - new)} to rank {_ranks(new - old)}")
    return lines or ["nothing moved"]


def _ranks(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
