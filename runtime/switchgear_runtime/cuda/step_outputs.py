"""What a step on a device tells the host, in one copy: `StepOutputs`, drawn tokens, faults and counters side by side.

Kernels write into one set of arrays at addresses that stay; a copy of it in pinned memory belongs to each of two steps,
so that one can be read while the next one runs.

Letters: S rows that are sampled, N tenant rows, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.cuda.kernels import Kernels

NUM_COPIES = 2
NUM_FAULTS = 2  # of Kernels.faults


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepRead:
    """A step's, on the host: views, until the next but one step is enqueued."""

    drawn_S: NDArray[np.int64]
    faults: NDArray[np.int32]
    peer_faults_R1: NDArray[np.int32]
    rows_LE: NDArray[np.int64]
    routed_NLE: NDArray[np.int64]


class StepOutputs:
    """`num_tenants` rows of counters, and one more for padding, which nobody reads."""

    def __init__(
        self, kernels: Kernels, *, num_rows: int, num_ranks: int, num_tenants: int, num_layers: int, num_experts: int
    ) -> None:
        self._kernels = kernels
        self._num_tenants = num_tenants
        dims: dict[str, tuple[Any, tuple[int, ...]]] = {
            "drawn_S": (np.int64, (num_rows,)),
            "faults": (np.int32, (NUM_FAULTS,)),
            "peer_faults_R1": (np.int32, ((num_ranks + 2) // 2 * 2,)),
            "rows_LE": (np.int64, (num_layers, num_experts)),
            "routed_NLE": (np.int64, (num_tenants + 1, num_layers, num_experts)),  # last: a copy ends with those in use
        }
        sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (dtype, shape) in dims.items()}
        begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self._device = torch.zeros(sum(sizes.values()), dtype=torch.uint8, device=kernels.device)
        self._copies = [torch.zeros_like(self._device, device="cpu") for _ in range(NUM_COPIES)]
        if kernels.device.type == "cuda":
            self._copies = [copy.pin_memory() for copy in self._copies]
        self._places = {
            name: (begins[name], begins[name] + sizes[name], dtype, shape) for name, (dtype, shape) in dims.items()
        }
        self._counters_at = begins["rows_LE"]
        self._tenant_bytes = 8 * num_layers * num_experts
        self._routed_at = begins["routed_NLE"]
        self._turn = 0
        self.num_ranks = num_ranks
        self.drawn_S = self._tensor("drawn_S", torch.int64)
        self.peer_faults_R1 = self._tensor("peer_faults_R1", torch.int32)[: num_ranks + 1]
        self.rows_LE = self._tensor("rows_LE", torch.int64)
        self.routed_NLE = self._tensor("routed_NLE", torch.int64)
        kernels.faults = self._tensor("faults", torch.int32)

    @property
    def padding_row(self) -> int:
        """Of routed_NLE."""
        return self._num_tenants

    def begin_(self) -> None:
        """Enqueue: counters from zero."""
        self._kernels.zero_(self._device[self._counters_at :])

    def read(self, num_tenants: int) -> StepRead:
        """Enqueue the copy to the host, with the counters of so many tenants; complete when the stream has come there."""
        copy, self._turn = self._copies[self._turn], (self._turn + 1) % NUM_COPIES
        end = self._routed_at + num_tenants * self._tenant_bytes
        self._kernels.copy_(copy[:end], self._device[:end])
        arrays = {
            name: copy[begin:stop].numpy().view(dtype).reshape(shape)
            for name, (begin, stop, dtype, shape) in self._places.items()
        }
        return StepRead(
            drawn_S=arrays["drawn_S"],
            faults=arrays["faults"],
            peer_faults_R1=arrays["peer_faults_R1"][: self.num_ranks + 1],
            rows_LE=arrays["rows_LE"],
            routed_NLE=arrays["routed_NLE"][:num_tenants],
        )

    def clear_faults_(self) -> None:
        """Enqueue, after a step that had some."""
        self._kernels.zero_(self._device[: self._counters_at])

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        begin, end, _, shape = self._places[name]
        return self._device[begin:end].view(dtype).view(shape)
