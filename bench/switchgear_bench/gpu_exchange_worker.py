"""One rank of `bench gpu`'s exchanges, a process each: `main`.

All ranks run the same ways and sizes in the same order. Rank 0 prints a line of JSON for each.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor

from switchgear_bench.gpu_layer import DEEPSEEK, TINY, UNIFORM, Routing
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.backend import kernels_of
from switchgear_runtime.cuda.expert_group import ExpertGroup, Received
from switchgear_runtime.cuda.group_choice import GenerationGroups
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.row_payload import RowPayload
from switchgear_runtime.generation import GenerationDescriptor

TIMEOUT_S = 30.0
_REPEAT_S = 0.05
_CALLS_MAX = 200
_NUM_REPEATS = 5
_MAILBOX_BYTES = 1 << 20


def main(settings: dict[str, Any]) -> None:
    kernels = kernels_of(settings["device"], settings["rank"], settings["gemm_family"])
    with kernels.on_stream():
        _run(kernels, settings)


def _run(kernels: Kernels, settings: dict[str, Any]) -> None:
    rank, world_size = settings["rank"], settings["world_size"]
    shape = DEEPSEEK if settings["device"] == "cuda" else TINY
    descriptor = GenerationDescriptor(term=1, generation=1, world_size=world_size, epoch=0, channel=settings["channel"])
    transport = open_transport(
        "auto", descriptor, rank, mailbox_bytes=_MAILBOX_BYTES, timeout_s=TIMEOUT_S, device=str(kernels.device)
    )
    faults_R1 = torch.zeros(world_size + 1, dtype=torch.int32, device=kernels.device)
    groups = GenerationGroups.of(
        kernels,
        transport,
        RowPayload(kernels, "auto", shape.hidden),
        regions=PeerRegions(),
        descriptor=None,
        peer_faults_R1=faults_R1,
        max_tokens=max(settings["small"]),
        top_k=shape.top_k,
        hidden=shape.hidden,
        dispatch="auto",
        max_batched_tokens=max(settings["large"]),
        timeout_s=TIMEOUT_S,
    )
    try:
        for group, sizes in ((groups.small, settings["small"]), (groups.large, settings["large"])):
            for num_tokens in sizes if group is not None else ():
                assert group is not None
                groups.set_num_tokens(num_tokens)
                routing = Routing.draw(shape, num_tokens, UNIFORM, 7 * num_tokens + rank, kernels.device)
                trip = _RoundTrip(group, routing, shape.num_experts // world_size)
                seconds = trip.seconds(transport)
                assert not bool(faults_R1.any()), f"a wait failed: {faults_R1.tolist()}"
                if rank == 0:
                    answer = {"over": type(group).__name__, "num_tokens": num_tokens, "num_rows": trip.num_rows}
                    print(json.dumps({**answer, "seconds": seconds}), flush=True)
    finally:
        groups.close()
        transport.close()


class _RoundTrip:
    """A layer's rows to their experts and back; the experts give back what they got."""

    def __init__(self, group: ExpertGroup[Any], routing: Routing, slots_per_rank: int) -> None:
        self._group, self._routing, self._slots_per_rank = group, routing, slots_per_rank
        self._device = routing.h_TD.device
        handle, received = self._there()
        self._y_ND = _echo(received)
        found = group.combine(self._y_ND, routing.weights_TK, handle, timeout_s=TIMEOUT_S)
        expected = routing.x_TD.float() * routing.weights_TK.sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg="not what this rank sent")
        ranks_TK = routing.ids_TK.cpu() // slots_per_rank
        self.num_rows = sum(len(set(ranks)) for ranks in ranks_TK.tolist())  # sent by this rank

    def seconds(self, transport: Transport) -> float:
        """Of a round trip of the slowest rank; the best of some repetitions."""
        num_calls = max(1, min(_CALLS_MAX, int(_REPEAT_S / self._calls(transport, 2))))
        return min(self._calls(transport, num_calls) for _ in range(_NUM_REPEATS))

    def _there(self) -> tuple[Any, Received]:
        handle = self._group.create_handle(self._routing.ids_TK, self._slots_per_rank)
        return handle, self._group.dispatch(self._routing.h_TD, handle, timeout_s=TIMEOUT_S)

    def _calls(self, transport: Transport, num_calls: int) -> float:
        transport.barrier(timeout_s=TIMEOUT_S)
        start_s = time.perf_counter()
        for _ in range(num_calls):
            handle, _ = self._there()
            self._group.combine(self._y_ND, self._routing.weights_TK, handle, timeout_s=TIMEOUT_S)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        mine = (time.perf_counter() - start_s) / num_calls
        return max(float(view) for view in transport.all_gather(f"{mine:.9f}".encode(), timeout_s=TIMEOUT_S))


def _echo(received: Received) -> Tensor:
    """Each pair's row, where its result is expected."""
    groups, x_MD = received.groups, received.x_MX
    y_ND = torch.zeros(groups.x_rows_N.shape[0], x_MD.shape[1], dtype=x_MD.dtype, device=x_MD.device)
    num_pairs = int(groups.begin_S1[-1])
    y_ND[groups.y_rows_N[:num_pairs].long()] = x_MD[groups.x_rows_N[:num_pairs].long()]
    return y_ND
