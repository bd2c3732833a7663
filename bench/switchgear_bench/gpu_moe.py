"""The mixture-of-experts layer in `bench gpu`: ours beside its peers, by number of tokens, skew, and with the router or not.

In a cell all contenders get the same tokens, choices and weights, take turns, and are first compared with one another and,
where there are few tokens, with plain fp32. The baseline of a cell is its fastest peer. The bound is the weights of the
experts that were chosen, once, and the tokens in and out; or the products' FLOPs.

Letters: T tokens, D hidden, F ffn, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.gpu_clock import NUM_REPEATS, Bounds, Clock, Series
from switchgear_bench.gpu_goals import LAYER
from switchgear_bench.gpu_layer import Layer, Routing, Shape, routings
from switchgear_bench.gpu_peers import Contender, OurLayer, TorchGrouped, peers
from switchgear_bench.triton_moe import TritonMoe
from switchgear_runtime.cuda.kernels import Kernels

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TOLERANCE = 3e-2  # of the largest value, for bf16 rows
_ANOTHER_EXPERT = 0.35  # with the eighth best expert instead of the ninth
_REFERENCE_TOKENS = 8  # as many at most are computed in fp32, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What is measured together."""

    num_tokens: int
    skew: str
    with_router: bool

    @property
    def variant(self) -> str:
        return f"{self.skew}, router" if self.with_router else self.skew


class LayerBench:
    """All contenders on the weights of one layer."""

    def __init__(self, kernels: Kernels, shape: Shape, bounds: Bounds, clock: Clock) -> None:
        self._layer = Layer.random(shape, kernels.device)
        self._device = kernels.device
        self._bounds, self._clock = bounds, clock
        self._ours = OurLayer(kernels, self._layer)
        self._peers: list[Contender] = peers(self._layer)

    def rows(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        for cell in cells:
            yield self._row(cell)

    def _row(self, cell: Cell) -> dict[str, Any]:
        shape = self._layer.shape
        given = routings(shape, cell.num_tokens, cell.skew, self._device)
        head = {"kernel": LAYER, "shape": shape.name, "variant": cell.variant, "num_tokens": cell.num_tokens}
        errors: dict[str, str] = {}
        series: dict[str, Series] = {}
        expected = self._expected(given[0], cell)
        for contender in (self._ours, *self._peers):
            try:
                series[contender.name] = self._prepare(contender, given, cell, expected)
            except Exception as error:  # noqa: BLE001 - a contender that fails is named in the row; the others are timed
                errors[contender.name] = f"{type(error).__name__}: {error}"
        if self._ours.name in errors:
            return {**head, "error": errors[self._ours.name], "passed": False}
        seconds = dict(zip(series, self._clock.in_turns(list(series.values())), strict=True))
        mine_s = seconds.pop(self._ours.name)
        graph = series[self._ours.name].is_graph
        found = {
            name: {
                "time_us": median(theirs_s) * 1e6,
                "ratio": median(theirs / mine for theirs, mine in zip(theirs_s, mine_s, strict=True)),
                "graph": series[name].is_graph,
            }
            for name, theirs_s in seconds.items()
        }
        row = {**head, **self._bounds.row(*self._work(given, cell), median(mine_s)), "graph": graph}
        row |= {"peers": found, "errors": errors, "num_repeats": NUM_REPEATS, "baseline": None}
        if not found:
            return {**row, "baseline_us": None, "ratio_to_baseline": None}
        best = min(found, key=lambda name: found[name]["time_us"])
        return {
            **row,
            "baseline": best,
            "baseline_us": found[best]["time_us"],
            "ratio_to_baseline": found[best]["ratio"],
        }

    def _prepare(self, contender: Contender, given: Sequence[Routing], cell: Cell, expected: Tensor) -> Series:
        """Tuned if it can be, compared with what is expected, and captured."""
        if isinstance(contender, TritonMoe):
            contender.tune(given[0], self._clock)
        run = contender.routed if cell.with_router else contender
        found = run(given[0]).float()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # so that it fails here, under its name
        _near(found, expected, with_router=cell.with_router)
        return self._clock.series([_bound(run, routing) for routing in given])

    def _expected(self, routing: Routing, cell: Cell) -> Tensor:
        """What all must give: in fp32 where that is cheap, else torch's grouped product."""
        layer = self._layer
        if cell.num_tokens > _REFERENCE_TOKENS:
            torch_grouped = TorchGrouped(layer)
            return (torch_grouped.routed if cell.with_router else torch_grouped)(routing).float()
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        if cell.with_router:
            chances_TE = functional.linear(routing.h_TD, layer.router_ED).softmax(-1)
            weights_TK, ids = chances_TE.topk(layer.shape.top_k, -1)
            weights_TK, ids_TK = weights_TK / weights_TK.sum(-1, keepdim=True), ids.int()
        return plain(layer, routing.h_TD, ids_TK, weights_TK)

    def _work(self, given: Sequence[Routing], cell: Cell) -> tuple[float, float]:
        """Bytes and FLOPs of a call, on average."""
        shape = self._layer.shape
        touched = sum(routing.num_touched() for routing in given) / len(given)
        num_bytes = touched * 6 * shape.hidden * shape.ffn + 4 * cell.num_tokens * shape.hidden
        flops = 6.0 * cell.num_tokens * shape.top_k * shape.hidden * shape.ffn
        if cell.with_router:
            num_bytes += 2 * shape.num_experts * shape.hidden
            flops += 2.0 * cell.num_tokens * shape.num_experts * shape.hidden
        return num_bytes, flops


def plain(layer: Layer, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Slow: token by token, expert by expert, in fp32."""
    out_TD = torch.zeros_like(h_TD)
    for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (layer.w13_EXD[expert].float() @ h_TD[t]).chunk(2)
            out_TD[t] += weight * (layer.w2_EDF[expert].float() @ (functional.silu(gate) * up))
    return out_TD


def _near(found: Tensor, expected: Tensor, *, with_router: bool) -> None:
    """Where two experts are nearly as good, a router of other rounding takes the other: with it, some rows are less near."""
    scale = float(expected.abs().max())
    assert scale > 0.01, "the result is empty"
    assert found.shape == expected.shape
    assert not bool(found.isnan().any()), "the result has NaN"
    off_T = (found - expected).abs().amax(-1) / scale
    allowed, most = (0.3 * len(off_T) + 1, _ANOTHER_EXPERT) if with_router else (0, _TOLERANCE)
    assert int((off_T > _TOLERANCE).sum()) <= allowed, f"{int((off_T > _TOLERANCE).sum())} of {len(off_T)} rows differ"
    assert float(off_T.max()) <= most, f"a row is off by {float(off_T.max()):.2f} of the largest value"


def _bound(run: Any, routing: Routing) -> Any:
    return lambda: run(routing)
