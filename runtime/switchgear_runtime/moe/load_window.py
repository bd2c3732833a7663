"""Where the tokens of a stretch of steps went: `LoadWindow`, by source rank and by tenant. Imports no torch.

Counted at the router: padding, dummy rows and replicas do not show, so a planner sees what the traffic asked for.

Letters: S source ranks, N tenants (bounded; the last may be the rest of them), L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError

Int64 = NDArray[np.int64]

OTHER_TENANTS = "(other tenants)"  # those for whom no row was left


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadWindow:
    """Steps [begin_step, end_step) of the cluster. One source or tenant more than another window's: zeros there.

    Example, 1 layer, 3 experts, top-2, 4 tokens on rank 0: routed_SLE [[[4, 3, 1]]], routed_LE [[4, 3, 1]].
    """

    begin_step: int
    end_step: int
    seconds: float = 0.0  # that it took
    routed_SLE: Int64 = field(repr=False)
    tenants: tuple[str, ...] = ()
    routed_NLE: Int64 = field(repr=False, default_factory=lambda: np.zeros((0, 0, 0), np.int64))

    @property
    def routed_LE(self) -> Int64:
        """Of all sources."""
        routed_LE: Int64 = self.routed_SLE.sum(axis=0)
        return routed_LE

    @property
    def num_assignments(self) -> int:
        """Tokens x layers x top-k."""
        return int(self.routed_SLE.sum())

    def tenant(self, name: str) -> Int64:
        """[L, E] of one tenant; zeros for one that had nothing."""
        if name in self.tenants:
            routed_LE: Int64 = self.routed_NLE[self.tenants.index(name)]
            return routed_LE
        return np.zeros(self.routed_SLE.shape[1:], np.int64)

    @classmethod
    def joined(cls, windows: Sequence[LoadWindow]) -> LoadWindow:
        """One window over consecutive ones."""
        if not windows:
            raise ConfigError("no load windows to join; give at least one")
        num_sources = max(window.routed_SLE.shape[0] for window in windows)
        tenants = tuple(dict.fromkeys(name for window in windows for name in window.tenants))
        shape_LE = windows[0].routed_SLE.shape[1:]
        routed_SLE = np.zeros((num_sources, *shape_LE), np.int64)
        for window in windows:
            routed_SLE[: window.routed_SLE.shape[0]] += window.routed_SLE
        routed_NLE = np.zeros((len(tenants), *shape_LE), np.int64)
        for row, name in enumerate(tenants):
            routed_NLE[row] = sum(window.tenant(name) for window in windows)
        return cls(
            begin_step=windows[0].begin_step,
            end_step=windows[-1].end_step,
            seconds=sum(window.seconds for window in windows),
            routed_SLE=routed_SLE,
            tenants=tenants,
            routed_NLE=routed_NLE,
        )
