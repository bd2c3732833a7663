"""An experiment: experts drawn from a routing trace in place of the router's: `ForcedRouting`.

A token's experts are a function of its request's seed and its position, so ranks, batch mates, placement and failures
still change no bit. The seed modulo the number of windows chooses the window: traffic with seeds w, w + W, w + 2W, ...
is routed as window w was, and whoever sends it decides when the load drifts. Of each layer, each expert gets its share
of the window's tokens, and a token never gets one expert twice. What the model then says is nonsense.

Letters: W windows, L MoE layers, E logical experts, K top-k, T tokens, Q sequences, M rows of a table, G orders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.batch import Batch
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.routing_trace import RoutingTrace

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

NUM_ORDERS = 16
DRAWS_PER_ORDER = 64
NUM_ROWS = NUM_ORDERS * DRAWS_PER_ORDER
_TABLES_MAX = 16  # kept, of the windows used last


class ForcedRouting:
    """Of one model. One thread."""

    def __init__(self, trace: RoutingTrace, *, num_layers: int, num_experts: int, top_k: int) -> None:
        recorded = (trace.header.num_layers, trace.header.num_experts)
        if recorded != (num_layers, num_experts) or top_k > num_experts:
            raise ConfigError(
                f"forced_routing: the trace has (MoE layers, experts) = {recorded}; the model has "
                f"{(num_layers, num_experts)}"
            )
        self.digest = ""
        self._trace = trace
        self._top_k = top_k
        self._tables: dict[int, NDArray[np.uint16]] = {}

    @classmethod
    def load(cls, path: str | None, *, num_layers: int, num_experts: int, top_k: int) -> ForcedRouting | None:
        """From the file that EngineConfig.forced_routing names, if it does. `digest`: what ranks must agree on."""
        if path is None:
            return None
        routing = cls(RoutingTrace.load(path), num_layers=num_layers, num_experts=num_experts, top_k=top_k)
        routing.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        return routing

    def of_batch(self, batch: Batch) -> Int32:
        """`ids_LTK` of what the batch computes."""
        return self.ids_LTK(
            [entry.sequence.sampling.seed for entry in batch],
            [entry.num_tokens for entry in batch],
            [position for entry in batch for position in range(entry.start, entry.end)],
        )

    def ids_LTK(self, seeds_Q: Sequence[int], num_tokens_Q: Sequence[int], positions_T: Sequence[int]) -> Int32:
        """Of a batch's tokens, sequence by sequence; `seeds_Q` are the requests'."""
        seeds_T = np.repeat(np.array(seeds_Q, np.uint64), num_tokens_Q)
        windows_T = (seeds_T % np.uint64(len(self._trace))).astype(np.int64)
        mixed_T = _mixed(seeds_T ^ _mixed(np.array(positions_T, np.uint64)))
        ids = np.empty((self._trace.header.num_layers, len(seeds_T), self._top_k), np.int32)
        for window in np.unique(windows_T).tolist():
            here = windows_T == window
            table_LMK = self.table(window)
            ids[:, here] = table_LMK[:, (mixed_T[here] % np.uint64(table_LMK.shape[1])).astype(np.int64)]
        return ids

    def table(self, window: int) -> NDArray[np.uint16]:
        """[L, M, K]: of each layer, rows of K different experts that hold every expert as often as it is due. Where the
        trace has the window's tokens, they are the rows; a row is one token in all layers."""
        if window not in self._tables:
            while len(self._tables) >= _TABLES_MAX:
                del self._tables[next(iter(self._tables))]
            self._tables[window] = self._make(window)
        return self._tables[window]

    def _make(self, window: int) -> NDArray[np.uint16]:
        tokens = self._trace.tokens
        if tokens is not None and self._trace.header.top_k == self._top_k and len(tokens.of_window(window)):
            return np.ascontiguousarray(tokens.of_window(window).transpose(1, 0, 2))
        routed_LE = self._trace.windows[window].routed_LE
        return np.stack([draw(counts_E, self._top_k, [window, layer]) for layer, counts_E in enumerate(routed_LE)])


def draw(counts_E: Int64, top_k: int, key: Sequence[int]) -> NDArray[np.uint16]:
    """Rows [M, K] of different experts, each in K / sum(counts) * counts of the rows but for rounding; an expert that
    would be in more than all of them is in all. Systematic sampling (Madow 1949): the experts, in a random order, lie
    end to end with lengths as their shares, and a row takes those at K points of equal distance. The first point of each
    order is drawn too: else two experts would be rounded the same way in every order, and orders could not even it out."""
    num_experts = len(counts_E)
    shares_E = _capped(counts_E, top_k)
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(NUM_ORDERS * (num_experts + 1))
    order_GE = np.argsort(bits[NUM_ORDERS:].reshape(NUM_ORDERS, num_experts), axis=1, kind="stable")
    # In integers, so that no two points of a row fall into one expert: with n draws an order, points lie n * sum
    # apart, an expert is n * K * share long, and draw i begins at i * sum + start, start < sum.
    total = int(shares_E.sum())
    start_G = (bits[:NUM_ORDERS] % np.uint64(total)).astype(np.int64)
    ends_GE = (DRAWS_PER_ORDER * top_k) * np.cumsum(shares_E[order_GE], axis=1)
    points_IK = total * (np.arange(DRAWS_PER_ORDER)[:, None] + DRAWS_PER_ORDER * np.arange(top_k))
    rows = [
        order_E[np.searchsorted(ends_E, points_IK + start, side="right")]
        for order_E, ends_E, start in zip(order_GE, ends_GE, start_G.tolist(), strict=True)
    ]
    return np.concatenate(rows).astype(np.uint16)


def _capped(counts_E: Int64, top_k: int) -> Int64:
    """Shares with no expert over 1 / K of their sum, since a token takes an expert at most once; at least K above 0."""
    shares_E = counts_E.astype(np.int64) << 8
    if np.count_nonzero(shares_E) < top_k:  # they are in every row, and the others share what is left of it
        shares_E = np.where(shares_E > 0, 1 << 32, 1 << 16)
    order = np.argsort(-shares_E, kind="stable")
    rest = int(shares_E.sum())
    for num_capped, expert in enumerate(order[:top_k].tolist()):
        if int(shares_E[expert]) * (top_k - num_capped) <= rest:
            shares_E[order[:num_capped]] = rest // (top_k - num_capped) if num_capped else 0
            break
        rest -= int(shares_E[expert])
    return shares_E


def _mixed(values: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): all bits of the result depend on all of the value."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64 = mixed ^ (mixed >> np.uint64(31))
    return result
