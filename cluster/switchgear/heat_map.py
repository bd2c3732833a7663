"""Expert load as a heat map in the terminal: a row a layer, a cell an expert, grouped by the rank that computes it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

_SHADES = " ▁▂▃▄▅▆▇█"
_COLOURS = ("grey23", "navy_blue", "blue", "dodger_blue1", "green", "yellow", "orange1", "red", "red1")


def cell(load: int, load_max: int) -> tuple[str, str]:
    """(character, colour) of one load. Zero is blank; anything else shows."""
    if load <= 0 or load_max <= 0:
        return _SHADES[0], _COLOURS[0]
    level = max(1, min(len(_SHADES) - 1, round(load / load_max * (len(_SHADES) - 1))))
    return _SHADES[level], _COLOURS[level]


def balancedness(loads: Sequence[int]) -> float:
    """Mean over max of the ranks' loads; 1.0 is even."""
    return sum(loads) / len(loads) / max(loads) if any(loads) else 1.0


def heat_map(
    rows_RLE: Sequence[Sequence[Sequence[int]]], experts_of_rank: Sequence[Sequence[Sequence[int]]] | None = None
) -> Table:
    """A table from `rows_RLE`: token rows computed, [rank][layer][logical expert].

    `experts_of_rank[r][layer]`: which experts to show for rank r; by default those with any load there. Shading is relative to the
    layer's busiest expert, so that a hot expert stands out in its layer.
    """
    num_ranks, num_layers = len(rows_RLE), len(rows_RLE[0])
    table = Table(title="Token rows per expert, by layer and rank", title_justify="left", pad_edge=False)
    table.add_column("layer", justify="right")
    for rank in range(num_ranks):
        table.add_column(f"rank {rank}")
    table.add_column("rows by rank", justify="right")
    table.add_column("mean/max", justify="right")
    for layer in range(num_layers):
        load_max = max(max(rows_RLE[rank][layer]) for rank in range(num_ranks))
        cells: list[Text] = []
        for rank in range(num_ranks):
            loads = rows_RLE[rank][layer]
            shown = experts_of_rank[rank][layer] if experts_of_rank else [e for e, load in enumerate(loads) if load]
            text = Text()
            for expert in shown:
                character, colour = cell(loads[expert], load_max)
                text.append(character * 2, style=colour)
            cells.append(text)
        totals = [sum(rows_RLE[rank][layer]) for rank in range(num_ranks)]
        table.add_row(str(layer), *cells, " ".join(map(str, totals)), f"{balancedness(totals):.2f}")
    return table
