"""NCCL EP behind an ExpertGroup: `NcclEp`, its low-latency mode as a PairLibrary.

The ways that NCCL EP has, and whether a token's bits would be ours (docs/decisions/0017-libraries-behind-a-group.md):

- high throughput: the caller weights and sums a rank's results, NCCL EP the ranks', along its tree: refused;
- low latency, rank major: the caller sums a rank's results, NCCL EP the ranks': refused;
- low latency, expert major: summed at the source in router order, but the sum is rounded to bf16: refused;
- quantised dispatch or combine: rounds what crosses: refused;
- enable_mask: goes on without a rank that is late, and leaves its results out: refused;
- one expert a token, expert major, weight 1, bf16: sums nothing. This one.

STATUS: tested against a made-up module with the signatures of nccl-extensions 0.1.0; has run with no real NCCL EP, on no
GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.comm.nccl import Gpu
from switchgear_runtime.comm.nccl_communicator import start_together
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.pair_dispatch import Arrived
from switchgear_runtime.errors import ConfigError

HIDDEN_MULTIPLE = 512  # of its combine's vectors: two of 32 lanes of 16 bytes
VERSION_MIN = (0, 2)  # before, combine lacked a fence and could give garbage
PAIRS_MULTIPLE = 4  # of a rank's, for its bulk copies
_LEFT: list[Any] = []  # of earlier generations


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """Its tensors must live until the way back is done."""

    x_LMD: Tensor  # by slot of this rank, a place for every pair of every rank
    counts_S: Tensor
    num_pairs: int
    keeps: tuple[Any, ...]


class NcclEp:
    """A PairLibrary of one generation; all ranks construct it together. An EP group knows how many slots there are, so a
    placement with another number makes another group."""

    def __init__(self, control: Transport, gpu: Gpu, *, max_pairs: int, hidden: int, timeout_s: float) -> None:
        self._ep: Any = importlib.import_module("nccl.ep")
        self._core: Any = importlib.import_module("nccl.core")
        version = self._ep.get_lib_version()
        if (version.major, version.minor) < VERSION_MIN:
            raise ConfigError(f"dispatch='nccl-ep' needs NCCL EP 0.2 or later, and libnccl_ep is {version}; update it")
        self._control = control
        self._gpu = gpu
        self._max_pairs = -(-max_pairs // PAIRS_MULTIPLE) * PAIRS_MULTIPLE
        self._hidden = hidden
        self._timeout_s = timeout_s
        self._comm: Any = None
        self._group: Any = None
        self._handle: Any = None
        self._slots_per_rank = 0
        own_id = bytes(self._core.get_unique_id().as_bytes) if control.rank == 0 else b""
        unique_id = self._core.UniqueId.from_bytes(control.all_gather(own_id, timeout_s=timeout_s)[0])

        def start() -> int:
            with gpu.current():
                self._comm = self._core.Communicator.init(control.world_size, control.rank, unique_id)
            return 0

        start_together(control, "NCCL start", start, timeout_s=timeout_s)

    # --- out and back -------------------------------------------------------------------------------------------------

    def send(self, x_ND: Tensor, slot_ids_N: Tensor, slots_per_rank: int) -> _Sent:
        if slots_per_rank != self._slots_per_rank:
            self._regroup(slots_per_rank)
        ep, stream = self._ep, self._gpu.stream()
        topk_ids_N1 = slot_ids_N.view(-1, 1)
        topk_idx = self._tensor(topk_ids_N1)
        if self._handle is None:
            self._handle = self._group.create_handle(ep.Layout.EXPERT_MAJOR, topk_idx, stream=stream)
        else:
            self._handle.update(topk_idx, stream=stream)
        num_places = self._control.world_size * self._max_pairs
        x_LMD = torch.empty(slots_per_rank, num_places, self._hidden, dtype=x_ND.dtype, device=x_ND.device)
        counts_S = torch.zeros(slots_per_rank, dtype=torch.int32, device=x_ND.device)
        x, out, counts = self._tensor(x_ND), self._tensor(x_LMD), self._tensor(counts_S)
        self._handle.dispatch(
            ep.DispatchInputs(tokens=x),
            ep.DispatchOutputs(tokens=out),
            layout_info=ep.LayoutInfo(expert_counters=counts),
            stream=stream,
        )
        return _Sent(x_LMD, counts_S, len(x_ND), (x_ND, topk_ids_N1, topk_idx, x, out, counts))

    def arrived(self, sent: _Sent) -> Arrived:
        counts_S: list[int] = sent.counts_S.tolist()
        return Arrived(sent.x_LMD.view(-1, self._hidden), counts_S, self._rows(sent, counts_S))

    def give_back(self, y_ND: Tensor, sent: _Sent) -> Tensor:
        ep = self._ep
        results_LMD = torch.empty_like(sent.x_LMD)
        results_LMD.view(-1, self._hidden)[self._rows(sent, sent.counts_S.tolist()).long()] = y_ND
        rows_ND = torch.empty(sent.num_pairs, self._hidden, dtype=y_ND.dtype, device=y_ND.device)
        weights_N1 = torch.ones(sent.num_pairs, 1, dtype=torch.float32, device=y_ND.device)
        self._handle.combine(
            ep.CombineInputs(tokens=self._tensor(results_LMD)),
            ep.CombineOutputs(tokens=self._tensor(rows_ND), topk_weights=self._tensor(weights_N1)),
            stream=self._gpu.stream(),
        )
        return rows_ND

    def close(self) -> None:
        """Leaves group and communicator to the end of the process: the group's own end waits for all peers, and a peer that
        hangs may still write into it."""
        if self._comm is not None:
            _LEFT.append((self._handle, self._group, self._comm))
            self._handle = self._group = self._comm = None

    def _rows(self, sent: _Sent, counts_S: list[int]) -> Tensor:
        """Of the places, those with a row."""
        num_places = sent.x_LMD.shape[1]
        rows = [torch.arange(count) + slot * num_places for slot, count in enumerate(counts_S)]
        return torch.cat(rows).to(torch.int32).to(sent.x_LMD.device)

    def _regroup(self, slots_per_rank: int) -> None:
        """All ranks at once: they flip together."""

        def start() -> int:
            with self._gpu.current():
                if self._group is not None:
                    self._handle.destroy()
                    self._group.destroy()
                    self._handle = None
                config = self._ep.GroupConfig(
                    algorithm=self._ep.Algorithm.LOW_LATENCY,
                    num_experts=slots_per_rank * self._control.world_size,
                    max_dispatch_tokens_per_rank=self._max_pairs,
                    max_token_bytes=2 * self._hidden,
                    timeout_ns=int(self._timeout_s * 1e9),
                )
                self._group = self._ep.Group.create(self._comm, config)
            return 0

        start_together(self._control, "NCCL EP start", start, timeout_s=self._timeout_s)
        self._slots_per_rank = slots_per_rank

    def _tensor(self, tensor: Tensor) -> Any:
        core = self._core
        dtypes = {
            torch.bfloat16: core.BFLOAT16,
            torch.float32: core.FLOAT32,
            torch.int32: core.INT32,
            torch.int64: core.INT64,
        }
        assert tensor.is_contiguous()
        return self._ep.Tensor(tensor.data_ptr(), dtype=dtypes[tensor.dtype], shape=tuple(tensor.shape))
