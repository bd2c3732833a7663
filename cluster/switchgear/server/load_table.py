"""Expert load as the ranks report it: `LoadTable`, sums since the start."""

from __future__ import annotations

from operator import add

from switchgear.server.limits import ModelFacts
from switchgear_runtime.messages import StepFrame


class LoadTable:
    """Flat lists [layer * num_experts + expert], as on the wire. A report of another length is ignored."""

    def __init__(self, facts: ModelFacts) -> None:
        self.num_layers = facts.num_layers
        self.num_experts = facts.num_experts
        self._size = facts.num_layers * facts.num_experts
        self.routed_LE = [0] * self._size  # tokens by logical expert, counted at the router
        self._rows_by_rank: dict[int, list[int]] = {}  # rows computed by each rank's own experts

    def step(self, frame: StepFrame) -> None:
        if frame.expert_load is not None and len(frame.expert_load) == self._size:
            self.routed_LE = list(map(add, self.routed_LE, frame.expert_load))
        if frame.expert_rows is not None and len(frame.expert_rows) == self._size:
            before = self._rows_by_rank.get(frame.rank, [0] * self._size)
            self._rows_by_rank[frame.rank] = list(map(add, before, frame.expert_rows))

    def routed(self) -> list[list[int]]:
        """[layer][expert]."""
        return self._by_layer(self.routed_LE)

    def rows(self) -> list[list[list[int]]]:
        """[rank][layer][expert]; a rank that never reported has zeros."""
        num_ranks = max(self._rows_by_rank, default=-1) + 1
        return [self._by_layer(self._rows_by_rank.get(rank, [0] * self._size)) for rank in range(num_ranks)]

    def _by_layer(self, flat_LE: list[int]) -> list[list[int]]:
        return [flat_LE[i : i + self.num_experts] for i in range(0, self._size, self.num_experts or 1)]
