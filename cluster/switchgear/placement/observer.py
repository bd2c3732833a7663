"""What the ranks report, gathered into windows: `LoadObserver` and the `LoadWindow`s it closes.

A window begins with the first load after the one before and closes by the clock; while nothing is routed there is no
window and nothing to wake up for.

Letters: L MoE layers, E logical experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
HOTTEST = 10  # experts that metrics and views name


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """Tokens by logical expert, counted at the routers, and rows that each rank's experts computed."""

    begin_s: float
    end_s: float
    routed_LE: Int64
    rows_RL: Int64
    num_steps: int  # that it spans

    @property
    def imbalance_L(self) -> NDArray[np.float64]:
        """Max over mean of the ranks' rows in each layer; 1 is even, and so is a layer without rows."""
        rows_RL = self.rows_RL
        mean_L, imbalance_L = rows_RL.mean(axis=0), np.ones(rows_RL.shape[1])
        np.divide(rows_RL.max(axis=0), mean_L, out=imbalance_L, where=mean_L > 0)
        return imbalance_L

    def hottest(self, count: int = HOTTEST) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens), the most tokens first; ties to the lowest layer and expert."""
        flat = self.routed_LE.reshape(-1)
        order = np.argsort(-flat, kind="stable")[:count]
        return [(*divmod(int(index), self.routed_LE.shape[1]), int(flat[index])) for index in order if flat[index]]


class LoadObserver:
    """The open window. Reports of another shape than the model's are ignored."""

    def __init__(self, num_layers: int, num_experts: int, window_s: float) -> None:
        self._shape = (num_layers, num_experts)
        self._window_s = window_s
        self._num_ranks = 0
        self._routed_LE = np.zeros(self._shape, np.int64)
        self._rows_RL = np.zeros((0, num_layers), np.int64)
        self._num_steps = 0
        self.begin_s: float | None = None  # None: nothing was routed since the last window

    def begin(self, num_ranks: int) -> None:
        """A new group of ranks: what the last one left is dropped."""
        self._num_ranks = num_ranks
        self._clear()

    @property
    def due_s(self) -> float | None:
        return None if self.begin_s is None else self.begin_s + self._window_s

    def add(self, now_s: float, rank: int, routed: list[int] | None, rows: list[int] | None) -> None:
        """One report of one rank, flattened [L * E] as on the wire."""
        size = self._routed_LE.size
        if rank >= self._num_ranks:
            return
        if rows is not None and len(rows) == size:
            self._rows_RL[rank] += np.asarray(rows, np.int64).reshape(self._shape).sum(axis=1)
        if routed is not None and len(routed) == size:
            routed_LE = np.asarray(routed, np.int64).reshape(self._shape)
            if self.begin_s is None and routed_LE.any():
                self.begin_s = now_s
            self._routed_LE += routed_LE

    def add_steps(self, count: int) -> None:
        self._num_steps += count

    def peek(self, now_s: float) -> Window | None:
        """A copy of the open window, which stays open; None: nothing was routed since the last one."""
        if self.begin_s is None:
            return None
        return Window(
            begin_s=self.begin_s,
            end_s=now_s,
            routed_LE=self._routed_LE.copy(),
            rows_RL=self._rows_RL.copy(),
            num_steps=max(1, self._num_steps),
        )

    def close(self, now_s: float) -> Window:
        """What was gathered so far; the next window begins with the next load."""
        window = self.peek(now_s)
        assert window is not None
        self._clear()
        return window

    def _clear(self) -> None:
        self._routed_LE = np.zeros(self._shape, np.int64)
        self._rows_RL = np.zeros((self._num_ranks, self._shape[0]), np.int64)
        self._num_steps = 0
        self.begin_s = None
