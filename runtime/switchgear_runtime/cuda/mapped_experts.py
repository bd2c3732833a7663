"""The other ranks' experts where they lie on their devices: `MappedExperts`, to compute with in place and to pull copies of.

At the start of a generation each rank tells the handles of its pool's slabs, and then, as at every flip, its *slot
directory*: which slot of its pool holds which slot of the map. So every rank knows the address of every expert of the
map in force, on its own machine. An address stays good as long as its epoch: its owner gives a slot away only after all
headers have shown a later step on the next epoch (Membership.settle), and nobody computes with an epoch that is over.

Pulls run beside the steps and may outlive the epoch they began in. So they trust no address: the slot's stamp is read
before and after the copy, and must say the same, the wanted expert's. An owner clears it before it writes anything.

Letters: L MoE layers, S slots of the map on a rank, E logical experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.comm.mapped_slabs import MappedSlabs
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda.expert_pool import ExpertPool, Slot, SlotStamp, Source, slot_addresses
from switchgear_runtime.cuda.placement import DevicePlacements
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.errors import TransportError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.moe.expert_map import ExpertMap

Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Told:
    """Of one epoch: each rank's map and what it has where. Replaced as a whole."""

    expert_map: ExpertMap
    directory_RLS: NDArray[np.int32]  # slots of the ranks' pools; -1: empty


class MappedExperts:
    """One rank's. `pull` from the thread that stages; the others from the engine's. `on_stream`: of the kernels that
    compute with lent experts."""

    def __init__(
        self, pool: ExpertPool, copies: SideCopies, on_stream: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._pool = pool
        self._copies = copies
        self._on_stream = on_stream
        self._slabs: MappedSlabs | None = None
        self._addresses_R: list[Int64] = []  # of each rank's slots, by index; empty where nothing is mapped
        self._told: _Told | None = None

    @property
    def is_met(self) -> bool:
        return self._slabs is not None

    @property
    def reaches_all(self) -> bool:
        """Whether this rank can compute with any rank's experts."""
        return self._slabs is not None and self._slabs.reaches_all

    @property
    def pulled_bytes(self) -> int:
        """From other ranks' memory, since the start."""
        return self._copies.pulled_bytes

    def meet(
        self,
        transport: Transport,
        expert_map: ExpertMap,
        placements: DevicePlacements,
        *,
        timeout_s: float,
    ) -> DevicePlacements:
        """All ranks of a generation, before its first step. `placements` with the lent experts' addresses."""
        self.close()
        pool, layout = self._pool, self._pool.layout
        self._slabs = MappedSlabs.meet(
            transport,
            pool.memory,
            pool.slabs,
            layout=layout.text(),
            timeout_s=timeout_s,
            reads_are_done=self._copies.pulls_are_done,
        )
        self._addresses_R = [slot_addresses(layout, slabs) for slabs in self._slabs.slabs_R]
        return self.tell(transport, expert_map, placements, timeout_s=timeout_s)

    def tell(
        self,
        transport: Transport,
        expert_map: ExpertMap,
        placements: DevicePlacements,
        *,
        timeout_s: float,
    ) -> DevicePlacements:
        """All ranks, before the first step of an epoch. `placements`: this rank's of that epoch."""
        mine_LS = self._pool.indices(placements.map_addresses_LS)
        views = transport.all_to_all_v([mine_LS.tobytes()] * transport.world_size, timeout_s=timeout_s)
        directory_RLS = np.stack(
            [self._checked(transport.rank, peer, bytes(view), expert_map) for peer, view in enumerate(views)]
        )
        self._told = _Told(expert_map=expert_map, directory_RLS=directory_RLS)
        if not self.reaches_all or not placements.lends:
            return placements
        parts = np.array(self._pool.layout.offsets[:2])
        return placements.with_lent(self._lent(placements)[:, None, :] + parts[:, None])

    def pull(self, peer: int, source: Source, pace: Pace) -> Slot | None:
        """A copy of the expert that rank `peer` computes with, in a slot that is not stamped yet; None where its memory
        is not mapped. TransportError where the peer has given the expert up, and what `pace` raises."""
        slabs, told = self._slabs, self._told
        if slabs is None or told is None or self._pool.memory is None:
            return None
        with slabs.reading():
            address = self._address_of(peer, source, told)
            if address is None:
                return None
            copies, memory, slot = self._copies, self._pool.memory, self._pool.take(pace)
            before = copies.read(memory, address, SlotStamp.NUM_BYTES, peer=peer)
            if SlotStamp.source(before) == source:
                for part, begin in zip(slot.parts, slot.layout.offsets, strict=False):
                    copies.pull(memory, part, address + begin, pace, peer=peer)
                if copies.read(memory, address, SlotStamp.NUM_BYTES, peer=peer) == before:
                    return slot
        layer, expert, _ = source
        text = f"rank {peer} has given up expert {expert} of MoE layer {layer}, or has other weights of it"
        raise TransportError(text, rank=slabs.rank, peers=(peer,))

    def close(self) -> None:
        """The generation is over: unmaps what is not being read. Idempotent."""
        slabs, self._slabs, self._told = self._slabs, None, None
        if slabs is not None:
            with self._on_stream():  # unmapped once the kernels there have ended
                slabs.close()

    def _address_of(self, peer: int, source: Source, told: _Told) -> int | None:
        layer, expert, _ = source
        addresses, (slots,) = self._addresses_R[peer], np.nonzero(told.expert_map.local_experts(layer, peer) == expert)
        if not len(addresses) or not len(slots):
            return None
        return int(addresses[told.directory_RLS[peer, layer, slots[0]]])

    def _lent(self, placements: DevicePlacements) -> Int64:
        """[L, E]: the first byte of the slot, here or at a peer, in which each expert has its weights. Where several
        have it, that which this rank's tokens go to, so that the ranks' reads spread as their rows do."""
        assert self._told is not None
        ranks_LE, slots_LE = np.divmod(placements.slot_of_LE.numpy(), placements.slots_per_rank)
        layers_L1 = np.arange(len(ranks_LE))[:, None]
        firsts_R = np.cumsum([0, *map(len, self._addresses_R)])
        indices_LE = firsts_R[ranks_LE] + self._told.directory_RLS[ranks_LE, layers_L1, slots_LE]
        addresses_LE: Int64 = np.concatenate(self._addresses_R)[indices_LE]
        return addresses_LE

    def _checked(self, rank: int, peer: int, told: bytes, expert_map: ExpertMap) -> NDArray[np.int32]:
        """[L, S]. A kernel reads what these point to."""
        assert self._slabs is not None
        wanted_LS = np.stack([expert_map.local_experts(layer, peer) for layer in range(expert_map.num_layers)])
        num_bytes_R, size = self._slabs.num_bytes_R[peer], self._pool.layout.num_bytes
        if len(told) == 4 * wanted_LS.size:
            directory_LS = np.frombuffer(told, np.int32).reshape(wanted_LS.shape)
            num_slots = sum(num_bytes // size for num_bytes in num_bytes_R)
            in_pool = directory_LS < num_slots if num_slots else True  # whose memory has no handle tells no sizes
            if bool((in_pool & ((directory_LS >= 0) == (wanted_LS >= 0))).all()):
                return directory_LS
        text = f"rank {rank}: the slots that rank {peer} told are not those of the map of epoch {expert_map.epoch}"
        raise TransportError(text, rank=rank, peers=(peer,))
