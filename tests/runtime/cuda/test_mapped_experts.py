"""Pulling experts out of another rank's memory: whole, counted, and never another expert's bytes.

Two ranks in one thread, with pools and placements but no model: the puller's pace is where the owner acts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_checkpoints import run_ranks

from switchgear_runtime.comm.host_memory import HostPeerMemory
from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.cuda import side_copies
from switchgear_runtime.cuda.expert_pool import ExpertPool, Slot, Source
from switchgear_runtime.cuda.mapped_experts import MappedExperts
from switchgear_runtime.cuda.placement import DevicePlacements
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.cuda.slot_layout import SlotLayout
from switchgear_runtime.errors import TransportAborted, TransportError, TransportTimeout
from switchgear_runtime.moe.expert_map import ExpertMap

LAYOUT = SlotLayout((1000, 300))
NUM_LAYERS, NUM_EXPERTS = 2, 6
PIECE_BYTES = 128
CPU = torch.device("cpu")


class StuckMemory(HostPeerMemory):
    """Copies that never end."""

    is_stuck = False

    def mark(self) -> Callable[[], bool]:
        return lambda: not self.is_stuck


class Rank:
    """A pool with the experts of a map, and the way to the others'."""

    def __init__(self, rank: int, memory: PeerMemory | None = None) -> None:
        self.rank = rank
        self.copies = SideCopies(CPU, rank, timeout_s=0.2)
        self.pool = ExpertPool(LAYOUT, memory or StuckMemory(), self.copies)
        self.pool.grow(NUM_LAYERS * NUM_EXPERTS + 2)
        self.peers = MappedExperts(self.pool, self.copies, nullcontext)
        self.slots: dict[Source, Slot] = {}

    def hold(self, source: Source) -> Slot:
        slot = self.pool.take()
        for part, wanted in zip(slot.parts, content(source), strict=True):
            part.copy_(wanted)
        self.pool.stamp(slot.parts[0], source)
        self.slots[source] = slot
        return slot

    def placements(self, expert_map: ExpertMap) -> DevicePlacements:
        """Holds what it lacks, lets go of the rest."""
        before = dict(self.slots)
        addresses_L2S: list[list[list[int]]] = []
        slot_of_LE = []
        stride = expert_map.slots_per_rank + NUM_EXPERTS
        for layer in range(NUM_LAYERS):
            experts = expert_map.local_experts(layer, self.rank).tolist()
            slots = [None if e < 0 else before.get((layer, e, "")) or self.hold((layer, e, "")) for e in experts]
            ranks_E, slots_E = np.divmod(expert_map.slot_table(layer, self.rank), expert_map.slots_per_rank)
            held = [[0 if one is None else one.parts[part].data_ptr() for one in slots] for part in (0, 1)]
            addresses_L2S.append([part + [0] * NUM_EXPERTS for part in held])
            slot_of_LE.append((ranks_E * stride + slots_E).astype(np.int32))
            kept = {(layer, e, "") for e in experts}
            self.slots = {source: s for source, s in self.slots.items() if source[0] != layer or source in kept}
        return DevicePlacements(
            slots_L=[],
            num_map_slots=expert_map.slots_per_rank,
            lends=True,
            addresses_L2S=torch.tensor(addresses_L2S),
            experts_LS=torch.zeros(NUM_LAYERS, stride, dtype=torch.int32),
            slot_of_LE=torch.from_numpy(np.stack(slot_of_LE)),
            variant_slots_LNE=torch.zeros(NUM_LAYERS, 0, NUM_EXPERTS, dtype=torch.int32),
        )


def content(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(abs(hash(source)) % (1 << 31))
    first, second = (torch.randint(256, (n,), generator=draw, dtype=torch.uint8) for n in LAYOUT.part_bytes)
    return first, second


def check_content(slot: Slot, source: Source) -> None:
    for part, wanted in zip(slot.parts, content(source), strict=True):
        assert torch.equal(part, wanted)


def random_map(seed: int, num_ranks: int, epoch: int = 0) -> ExpertMap:
    return ExpertMap.random(
        np.random.default_rng(seed), NUM_LAYERS, NUM_EXPERTS, num_ranks, num_redundant=2, epoch=epoch
    )


def met(expert_map: ExpertMap, memories: dict[int, PeerMemory] | None = None) -> list[Rank]:
    """Ranks of a generation on this map, each with lent addresses that hold the right bytes."""
    ranks = [Rank(rank, (memories or {}).get(rank)) for rank in range(expert_map.num_ranks)]
    tell(ranks, expert_map, meet=True)
    return ranks


def tell(ranks: list[Rank], expert_map: ExpertMap, *, meet: bool = False) -> None:
    def run(rank: int, transport: Transport) -> None:
        peers = ranks[rank].peers
        call = peers.meet if meet else peers.tell
        placements = call(transport, expert_map, ranks[rank].placements(expert_map), timeout_s=10.0)
        assert peers.reaches_all
        lent_L2E = placements.addresses_L2S[:, :, placements.num_map_slots :]
        for layer, expert in np.ndindex(NUM_LAYERS, NUM_EXPERTS):
            addresses = lent_L2E[layer, :, expert].tolist()
            for address, wanted in zip(addresses, content((layer, expert, "")), strict=True):
                found = torch.empty_like(wanted)
                HostPeerMemory().copy(found.data_ptr(), address, wanted.numel())
                assert torch.equal(found, wanted), f"rank {rank}, layer {layer}, expert {expert}"
        transport.barrier(timeout_s=10.0)

    run_ranks(len(ranks), run)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_copies, "PIECE_BYTES", PIECE_BYTES)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_expert_can_be_lent_and_pulled_in_every_epoch(num_ranks: int) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    ranks = met(random_map(seed, num_ranks))
    puller = ranks[0]
    num_bytes = 0
    for epoch in (0, 1, 2):
        expert_map = random_map(seed + epoch, num_ranks, epoch)
        tell(ranks, expert_map)
        for layer in range(NUM_LAYERS):
            for expert in range(NUM_EXPERTS):
                for peer in range(num_ranks):
                    paced: list[int] = []
                    slot = puller.peers.pull(peer, (layer, expert, ""), paced.append)
                    holds = expert in expert_map.local_experts(layer, peer)
                    assert (slot is not None) == holds, f"seed {seed}"
                    if slot is not None:
                        check_content(slot, (layer, expert, ""))
                        assert sum(paced) == 1300
                        assert max(paced) == PIECE_BYTES
                        num_bytes += 1300
                    del slot
    assert puller.peers.pulled_bytes == num_bytes
    assert puller.pool.num_free == puller.pool.num_slots - len(puller.slots)  # copies that nobody kept
    for rank in ranks:
        rank.peers.close()
        assert isinstance(rank.pool.memory, HostPeerMemory)
        assert not rank.pool.memory._mapped


def held_by(rank: int, expert_map: ExpertMap) -> Source:
    return 0, int(max(expert_map.local_experts(0, rank))), ""


@pytest.mark.parametrize("after_bytes", [0, PIECE_BYTES, 900, 1299])
@pytest.mark.parametrize("what", ["the same expert", "another one", "being written"])
def test_a_slot_that_is_given_away_meanwhile_is_never_taken_for_the_expert(after_bytes: int, what: str) -> None:
    """Whenever its owner takes the slot again: during the copy, the puller notices; and even for the same expert."""
    expert_map = random_map(3, 2)
    puller, owner = met(expert_map)
    source = held_by(1, expert_map)
    copied = 0

    def pace(num_bytes: int) -> None:
        nonlocal copied
        if copied <= after_bytes < copied + num_bytes:
            gone = owner.slots.pop(source)
            index = gone.index
            del gone
            while (slot := owner.pool.take()).index != index:
                others.append(slot)
            slot.parts[0].fill_(0xEE)
            if what != "being written":
                owner.pool.stamp(slot.parts[0], source if what == "the same expert" else (1, 5, ""))
            others.append(slot)
        copied += num_bytes

    others: list[Slot] = []
    with pytest.raises(TransportError, match=f"rank 1 has given up expert {source[1]} of MoE layer 0") as caught:
        puller.peers.pull(1, source, pace)
    assert caught.value.peers == (1,)
    del caught  # it refers to the copy
    assert puller.pool.num_free == puller.pool.num_slots - len(puller.slots)
    if what != "the same expert":
        with pytest.raises(TransportError, match="given up"):  # nor when it comes later still
            puller.peers.pull(1, source, lambda _: None)


def test_an_expert_that_was_given_up_and_not_overwritten_is_still_itself() -> None:
    expert_map = random_map(4, 2)
    puller, owner = met(expert_map)
    source = held_by(1, expert_map)
    slot = puller.peers.pull(1, source, lambda _: owner.slots.pop(source, None))
    assert slot is not None
    check_content(slot, source)


def test_other_weights_of_the_expert_are_not_taken() -> None:
    """The file of a newer version, where the checkpoint's are held."""
    expert_map = random_map(5, 2)
    puller, _ = met(expert_map)
    layer, expert, _ = held_by(1, expert_map)
    with pytest.raises(TransportError, match="or has other weights of it"):
        puller.peers.pull(1, (layer, expert, "ab" * 32), lambda _: None)


def test_a_cancelled_pull_and_one_after_the_generation() -> None:
    expert_map = random_map(6, 2)
    puller, owner = met(expert_map)
    source = held_by(1, expert_map)

    def cancelled(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError) as caught:
        puller.peers.pull(1, source, cancelled)
    del caught
    assert puller.pool.num_free == puller.pool.num_slots - len(puller.slots)

    slot = puller.peers.pull(1, source, lambda _: puller.peers.close())  # in the middle: what is read stays mapped
    assert slot is not None
    check_content(slot, source)
    assert isinstance(puller.pool.memory, HostPeerMemory)
    assert not puller.pool.memory._mapped
    assert puller.peers.pull(1, source, lambda _: None) is None
    assert not puller.peers.reaches_all
    owner.peers.close()


def test_closed_between_looking_and_reading() -> None:
    expert_map = random_map(6, 2)
    puller, _ = met(expert_map)
    slabs = puller.peers._slabs
    assert slabs is not None
    slabs.close()
    with pytest.raises(TransportAborted, match="the generation is over"):
        puller.peers.pull(1, held_by(1, expert_map), lambda _: None)


def test_an_own_device_that_does_not_finish_is_named() -> None:
    expert_map = random_map(7, 2)
    memory = StuckMemory()
    puller, _ = met(expert_map, {0: memory})
    memory.is_stuck = True
    with pytest.raises(TransportTimeout, match=r"waited 0\.2 s for a copy from rank 1's memory"):
        puller.peers.pull(1, held_by(1, expert_map), lambda _: None)
