"""How the ranks of a generation exchange rows: `GenerationGroups`, an ExpertGroup for large steps and one for small ones.

Letters: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from switchgear_runtime.comm.device_exchange import device_exchange
from switchgear_runtime.comm.domain_transport import DomainTransport
from switchgear_runtime.comm.nccl import Gpu
from switchgear_runtime.comm.nccl_library import nccl
from switchgear_runtime.comm.partition_exchange import PartitionExchange
from switchgear_runtime.comm.peer_memory import peer_memory_between
from switchgear_runtime.comm.peer_regions import PeerRegions
from switchgear_runtime.comm.peer_transport import PeerTransport
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import LIBRARY_DISPATCHES
from switchgear_runtime.cuda import deepep_dispatch, nccl_ep_dispatch
from switchgear_runtime.cuda.deepep_dispatch import DeepEp
from switchgear_runtime.cuda.expert_group import ExpertGroup
from switchgear_runtime.cuda.flat_dispatch import FlatDispatch
from switchgear_runtime.cuda.hierarchical_dispatch import HierarchicalDispatch
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.local_group import LocalGroup
from switchgear_runtime.cuda.nccl_ep_dispatch import NcclEp
from switchgear_runtime.cuda.pair_dispatch import PairDispatch, PairLibrary
from switchgear_runtime.cuda.peer_group import PeerGroup
from switchgear_runtime.cuda.row_payload import RowPayload
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.generation import GenerationDescriptor

_HIDDEN_MULTIPLES = {"deepep": deepep_dispatch.HIDDEN_MULTIPLE, "nccl-ep": nccl_ep_dispatch.HIDDEN_MULTIPLE}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GenerationGroups:
    """`large`: whose bytes know no bound, and whose host knows how much goes where. `small`: which only enqueues, so that
    a step can be captured, in room for so many tokens; None where ranks cannot map each other's memory."""

    rank: int
    large: ExpertGroup[Any]
    small: ExpertGroup[Any] | None

    @classmethod
    def of(
        cls,
        kernels: Kernels,
        transport: Transport,
        payload: RowPayload,
        *,
        regions: PeerRegions,
        descriptor: GenerationDescriptor | None,
        peer_faults_R1: Tensor,
        max_tokens: int,
        top_k: int,
        hidden: int,
        dispatch: str,
        max_batched_tokens: int,
        timeout_s: float,
    ) -> GenerationGroups:
        """On all ranks at once, and the same on all. `regions`: this rank's, closed; those of ended generations are freed, as
        `descriptor` allows. `dispatch`: EngineConfig's; a library takes small steps, too."""
        if transport.world_size > 1:
            transport.barrier(timeout_s=timeout_s)
        regions.free(descriptor)
        for part in _peer_transports(transport):
            regions.add(part.region)
            part.meet(timeout_s=timeout_s)
        if transport.world_size == 1:
            alone = LocalGroup(kernels, payload)
            return cls(rank=0, large=alone, small=alone if max_tokens > 0 else None)
        if dispatch in LIBRARY_DISPATCHES:
            max_pairs = max_batched_tokens * top_k
            group = library_group(kernels, transport, dispatch, max_pairs=max_pairs, hidden=hidden, timeout_s=timeout_s)
            return cls(rank=transport.rank, large=group, small=None)
        large = large_group(kernels, transport, payload)
        memory = peer_memory_between(transport, kernels.device, timeout_s=timeout_s) if max_tokens > 0 else None
        small = None
        if memory is not None:
            small = PeerGroup.meet(
                kernels,
                transport,
                memory,
                payload,
                regions,
                faults_R1=peer_faults_R1,
                max_tokens=max_tokens,
                top_k=top_k,
                hidden=hidden,
                timeout_s=timeout_s,
            )
        return cls(rank=transport.rank, large=large, small=small)

    def set_num_tokens(self, num_tokens: int) -> None:
        """The small group's steps from here on have at most so many on any rank."""
        if isinstance(self.small, PeerGroup):
            self.small.num_tokens = num_tokens

    def abort(self) -> None:
        if isinstance(self.small, PeerGroup):
            self.small.abort()

    def close(self) -> None:
        self.large.close()
        if self.small is not None and self.small is not self.large:
            self.small.close()


def _peer_transports(transport: Transport) -> list[PeerTransport]:
    """Of those that this one is made of."""
    if isinstance(transport, DomainTransport):
        inner = [] if transport.inner is None else _peer_transports(transport.inner)
        return _peer_transports(transport.world) + inner
    return [transport] if isinstance(transport, PeerTransport) else []


def check_rows(dispatch: str, hidden: int) -> None:
    """ConfigError where a library cannot take the model's rows."""
    multiple = _HIDDEN_MULTIPLES.get(dispatch, 1)
    if hidden % multiple:
        raise ConfigError(
            f"dispatch={dispatch!r} takes rows of multiples of {multiple} values, and this model's have {hidden}; use "
            "dispatch='auto'"
        )


def large_group(kernels: Kernels, transport: Transport, payload: RowPayload) -> ExpertGroup[Any]:
    """Of several ranks: by domain, where the transport knows of any."""
    if isinstance(transport, DomainTransport):
        return _hierarchical(kernels, transport, payload)
    exchange = device_exchange(transport)
    return FlatDispatch(kernels, exchange, payload, rank=transport.rank, num_ranks=transport.world_size)


def _hierarchical(kernels: Kernels, transport: DomainTransport, payload: RowPayload) -> HierarchicalDispatch:
    domains, rank = transport.domains, transport.rank
    outer = device_exchange(transport.world)
    if transport.inner is not None:
        inner = device_exchange(transport.inner)
    else:
        inner = PartitionExchange(outer, domains.members[domains.at(rank)[0]], domains.num_ranks)
    return HierarchicalDispatch(kernels, outer, inner, payload, domains, rank)


def library_group(
    kernels: Kernels, control: Transport, dispatch: str, *, max_pairs: int, hidden: int, timeout_s: float
) -> PairDispatch:
    """`max_pairs`: of a rank in a step."""
    gpu = Gpu(kernels.device)
    library: PairLibrary
    if dispatch == "deepep":
        library = DeepEp(control, gpu, nccl(), max_pairs=max_pairs, hidden=hidden, timeout_s=timeout_s)
    else:
        library = NcclEp(control, gpu, max_pairs=max_pairs, hidden=hidden, timeout_s=timeout_s)
    return PairDispatch(kernels, control, library, gpu.mark)
