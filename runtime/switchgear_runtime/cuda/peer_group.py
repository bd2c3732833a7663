"""Rows by kernels through peer memory, without the host: `PeerGroup`, the ExpertGroup of small steps.

Everything has its address before the first step and its room for the most tokens, so a step of it can be captured as a
graph. Who is missing is found by the kernels, which wait with a deadline and leave its name in `faults_R1` for the host
to read after the step; `abort` ends their waits at once.

Letters: T tokens, D hidden, K top-k, N pairs, M rows, R ranks, S slots of this rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.comm.peer_region import PeerRegion
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.expert_group import Received
from switchgear_runtime.cuda.kernels import DispatchPlan, Kernels
from switchgear_runtime.cuda.row_payload import RowPayload

LATE_DISPATCH, LATE_RESULTS, TOO_MUCH = 1, 2, 4  # in fault_R1, as csrc/cuda/peer.cu has them


@dataclass(frozen=True, slots=True, eq=False)
class PeerHandle:
    """A layer's plan, and its pairs as they came here."""

    plan: DispatchPlan
    slots_per_rank: int
    pairs_to_R1: Tensor


class PeerGroup:
    """Of one generation. `max_tokens`: of a rank in a step, the same on all; `num_tokens`, which may change between
    steps, bounds what any rank has in this one, so that a small step does not pay for a large one's room."""

    def __init__(
        self,
        kernels: Kernels,
        region: PeerRegion,
        payload: RowPayload,
        args: structs.Peer,
        keep: Sequence[Tensor],
        abort: Tensor,
    ) -> None:
        self._kernels = kernels
        self._region = region
        self._payload = payload
        self._args = args
        self._keep = keep  # what `args` has addresses of
        self._abort = abort
        self._rank, self._num_ranks, self._top_k = args.rank, args.num_ranks, args.top_k
        self.max_tokens = self.num_tokens = args.max_tokens
        num_bytes = args.num_ranks * args.max_tokens * payload.row_bytes
        data = _view(region.own + kernels.size("peer_rows_at", args), num_bytes, kernels.device)
        self._rows_MX = payload.rows_of(data)

    @classmethod
    def meet(
        cls,
        kernels: Kernels,
        control: Transport,
        memory: PeerMemory,
        payload: RowPayload,
        regions: PeerRegions,
        *,
        faults_R1: Tensor,
        max_tokens: int,
        top_k: int,
        hidden: int,
        timeout_s: float,
    ) -> PeerGroup | None:
        """All ranks at once; None, on all, where one cannot map the others' memory. `faults_R1`: int32 on the device,
        zeros. `regions`: which close and free this group's."""
        device, num_ranks = kernels.device, control.world_size
        sequence = torch.ones(1, dtype=torch.int32, device=device)
        done_R = torch.zeros(num_ranks, dtype=torch.int32, device=device)
        abort = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")  # which a GPU can read
        args = structs.Peer(
            num_ranks=num_ranks,
            rank=control.rank,
            max_tokens=max_tokens,
            top_k=top_k,
            hidden=hidden,
            row_bytes=payload.row_bytes,
            sequence=sequence.data_ptr(),
            done_R=done_R.data_ptr(),
            fault_R1=faults_R1.data_ptr(),
            abort=abort.data_ptr(),
            timeout_ns=int(timeout_s * 1e9),
        )
        region = PeerRegion(memory, control.rank)
        regions.add(region)
        if not region.meet(control, kernels.size("peer_bytes", args), timeout_s=timeout_s):
            return None
        regions_R = torch.tensor(region.addresses, dtype=torch.int64).to(device)
        args.regions_R = regions_R.data_ptr()
        return cls(kernels, region, payload, args, (sequence, done_R, faults_R1, regions_R), abort)

    # --- a layer ------------------------------------------------------------------------------------------------------

    def create_handle(self, slot_ids_TK: Tensor, slots_per_rank: int) -> PeerHandle:
        assert slot_ids_TK.shape[0] <= self.num_tokens
        plan = self._kernels.plan_dispatch(slot_ids_TK, self._num_ranks, slots_per_rank)
        return PeerHandle(plan, slots_per_rank, self._kernels.empty(self._num_ranks + 1, dtype=torch.int32))

    def dispatch(self, h_TD: Tensor, handle: PeerHandle, *, timeout_s: float) -> Received:  # noqa: ARG002
        """The deadline is the one that the group was made with: it is in captured launches."""
        kernels, plan, num_ranks = self._kernels, handle.plan, self._num_ranks
        num_pairs = num_ranks * self.num_tokens * self._top_k
        from_begin_R1 = kernels.empty(num_ranks + 1, dtype=torch.int32)
        pairs_N2 = kernels.empty(num_pairs, 2, dtype=torch.int32)
        rows: dict[str, int] = {"x_TD": h_TD.data_ptr(), "row_tokens_M": plan.row_tokens_M.data_ptr()}
        if not self._payload.is_rounded:  # then dispatch does it on the way
            rows = {"rows_M": self._payload.spread(h_TD, plan, len(plan.row_tokens_M)).data_ptr()}
        args = self._with(
            **rows,
            rows_begin_R1=plan.rows_begin_R1.data_ptr(),
            pairs_N2=plan.pairs_N2.data_ptr(),
            pairs_begin_R1=plan.pairs_begin_R1.data_ptr(),
            from_begin_R1=from_begin_R1.data_ptr(),
            pairs_to_N2=pairs_N2.data_ptr(),
            pairs_to_R1=handle.pairs_to_R1.data_ptr(),
            num_tokens=self.num_tokens,
        )
        kernels.call("peer_dispatch", args)
        kernels.call("peer_arrive", args)
        slots = handle.slots_per_rank
        groups = kernels.group(pairs_N2, from_begin_R1, handle.pairs_to_R1, self._rank * slots, slots)
        return Received(x_MX=self._rows_MX, groups=groups)

    def combine(self, y_ND: Tensor, weights_TK: Tensor, handle: PeerHandle, *, timeout_s: float) -> Tensor:  # noqa: ARG002
        num_tokens = weights_TK.shape[0]
        out_TD = self._kernels.empty(num_tokens, y_ND.shape[1])
        args = self._with(
            y_ND=y_ND.data_ptr(),
            pairs_to_R1=handle.pairs_to_R1.data_ptr(),
            pair_index_TK=handle.plan.pair_index_TK.data_ptr(),
            weights_TK=weights_TK.data_ptr(),
            out_TD=out_TD.data_ptr(),
            num_tokens=num_tokens,
        )
        self._kernels.call("peer_give_back", args)
        self._kernels.call("peer_combine", args)
        return out_TD

    def _with(self, **fields: int) -> structs.Peer:
        args = structs.Peer.from_buffer_copy(self._args)
        for name, value in fields.items():
            setattr(args, name, value)
        return args

    # --- life ---------------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """No kernel waits any more, in this step or a later one. Any thread."""
        self._abort[0] = 1

    def close(self) -> None:
        """Its memory is PeerRegions'."""
        self._rows_MX = torch.empty(0)


def _view(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """uint8 at an address that is not torch's. It does not keep the memory."""
    if device.type != "cuda":
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    import cupy

    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, num_bytes, None), 0)
    raw_bytes = cupy.ndarray((num_bytes,), dtype=cupy.uint8, memptr=memory)
    return torch.utils.dlpack.from_dlpack(raw_bytes)
