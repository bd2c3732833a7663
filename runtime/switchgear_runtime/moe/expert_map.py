"""Which expert lies in which slot of which rank: `ExpertMap`, one version of it per epoch. Imports no torch.

Glossary: a *logical expert* is one of the checkpoint's; a *slot* (physical expert) is a place for one on a rank,
numbered globally, rank r owning slots [r * slots_per_rank, (r + 1) * slots_per_rank) of every layer; *replicas* are
slots with one logical expert. The number of experts need not divide by that of ranks: a rank may have empty slots
(-1).

Letters: L MoE layers, E logical experts, P = R * slots_per_rank slots, R ranks, T tokens, K top-k.

Example, 3 experts on 2 ranks: ExpertMap.contiguous(1, 3, 2).physical_to_logical_LP == [[0, 1, 2, -1]].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError

EMPTY = -1
SLOTS_MAX = 1 << 20  # of one layer over all ranks
Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertMap:
    """An immutable placement. Every method is a pure function of the fields, so all ranks derive the same tables."""

    epoch: int
    num_ranks: int
    num_experts: int
    physical_to_logical_LP: Int32 = field(repr=False)

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_ranks: int, *, epoch: int = 0) -> ExpertMap:
        """Each expert once, in order; the first ranks take one more where it does not divide."""
        fewer, more = divmod(num_experts, num_ranks)
        slots_per_rank = fewer + (more > 0)
        row = np.full((num_ranks, slots_per_rank), EMPTY, np.int32)
        start = 0
        for rank in range(num_ranks):
            count = fewer + (rank < more)
            row[rank, :count] = np.arange(start, start + count)
            start += count
        return cls._make(epoch, num_ranks, num_experts, np.tile(row.reshape(-1), (num_layers, 1)))

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        num_layers: int,
        num_experts: int,
        num_ranks: int,
        *,
        num_redundant: int = 0,
        epoch: int = 0,
    ) -> ExpertMap:
        """A valid map for tests: slots at random, up to `num_redundant` replicas per layer."""
        num_redundant = min(num_redundant, num_experts * (num_ranks - 1))
        slots_per_rank = -(-(num_experts + num_redundant) // num_ranks) + 1  # one to spare, so that places vary
        slots_per_rank = min(slots_per_rank, num_experts)
        physical = np.full((num_layers, num_ranks, slots_per_rank), EMPTY, np.int32)
        for layer in range(num_layers):
            experts = [*rng.permutation(num_experts).tolist(), *rng.integers(num_experts, size=num_redundant).tolist()]
            for index, expert in enumerate(experts):
                free = [
                    (rank, slot)
                    for rank in range(num_ranks)
                    if expert not in physical[layer, rank]
                    for slot in np.flatnonzero(physical[layer, rank] == EMPTY).tolist()
                ]
                if free:
                    rank, slot = free[int(rng.integers(len(free)))]
                    physical[layer, rank, slot] = expert
                else:
                    assert index >= num_experts  # only a replica may find no place
        return cls._make(epoch, num_ranks, num_experts, physical.reshape(num_layers, -1))

    @classmethod
    def of(cls, physical_to_logical_LP: Int32, *, num_ranks: int, num_experts: int, epoch: int) -> ExpertMap:
        """Of [L, R * slots_per_rank] logical ids; ConfigError where it is no placement."""
        return cls._make(epoch, num_ranks, num_experts, physical_to_logical_LP)

    @classmethod
    def _make(cls, epoch: int, num_ranks: int, num_experts: int, physical_LP: Int32) -> ExpertMap:
        physical_LP = np.ascontiguousarray(physical_LP, np.int32)
        physical_LP.flags.writeable = False
        expert_map = cls(epoch=epoch, num_ranks=num_ranks, num_experts=num_experts, physical_to_logical_LP=physical_LP)
        expert_map.validate()
        return expert_map

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_LP.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical_LP.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    def validate(self) -> None:
        """ConfigError unless every expert of every layer has a slot, none lies twice on a rank, and all ids exist."""
        physical = self.physical_to_logical_LP
        if self.epoch < 0 or self.num_ranks < 1 or self.num_experts < 1:
            raise ConfigError(
                f"expert map: epoch={self.epoch}, num_ranks={self.num_ranks}, num_experts={self.num_experts}"
            )
        if physical.ndim != 2 or physical.shape[1] % self.num_ranks or not 0 < physical.shape[1] <= SLOTS_MAX:
            raise ConfigError(
                f"expert map: shape {physical.shape} is not [layers, a multiple of {self.num_ranks} ranks' slots]"
            )
        if (
            self.num_experts > physical.shape[1]
        ):  # before anything is as large as this number, which may be a stranger's
            raise ConfigError(
                f"expert map: num_experts={self.num_experts}, but a layer has only {physical.shape[1]} slots: some expert "
                "has no slot"
            )
        if physical.size and (physical.min() < EMPTY or physical.max() >= self.num_experts):
            raise ConfigError(f"expert map: an expert id is outside 0..{self.num_experts - 1}")
        is_held = physical != EMPTY
        is_there_LE = np.zeros((len(physical), self.num_experts), np.bool_)
        is_there_LE[np.nonzero(is_held)[0], physical[is_held]] = True
        for layer, expert in np.argwhere(~is_there_LE)[:1].tolist():
            raise ConfigError(f"expert map: layer {layer} has no slot for expert {expert}")
        sorted_LRS = np.sort(physical.reshape(len(physical), self.num_ranks, -1), axis=-1)
        is_twice = (sorted_LRS[..., 1:] == sorted_LRS[..., :-1]) & (sorted_LRS[..., 1:] != EMPTY)
        for layer, rank, _ in np.argwhere(is_twice)[:1].tolist():
            raise ConfigError(f"expert map: layer {layer}: rank {rank} holds one expert twice")

    def check_pool(self, pool_slots: int) -> None:
        """ConfigError if a rank holds more (layer, expert) pairs than its slot pool has places."""
        for rank, num_pairs in enumerate(self.pairs_per_rank.tolist()):
            if num_pairs > pool_slots:
                raise ConfigError(
                    f"expert map: rank {rank} holds {num_pairs} experts over all layers, its pool has {pool_slots} "
                    "slots; place fewer replicas, or raise survive"
                )

    @property
    def pairs_per_rank(self) -> NDArray[np.int64]:
        """[R] how many (layer, expert) pairs each rank holds, which all take a slot of its one pool."""
        held_LRS = self.physical_to_logical_LP.reshape(self.num_layers, self.num_ranks, -1) != EMPTY
        return np.asarray(held_LRS.sum(axis=(0, 2)), np.int64)

    def digest(self) -> int:
        """Of the placement, 32 bits; the same on all ranks."""
        return zlib.crc32(self.physical_to_logical_LP.tobytes())

    def with_epoch(self, epoch: int) -> ExpertMap:
        return replace(self, epoch=epoch)

    def local_experts(self, layer: int, rank: int) -> Int32:
        """Logical expert of each slot of `rank`; EMPTY where there is none."""
        first = rank * self.slots_per_rank
        return self.physical_to_logical_LP[layer, first : first + self.slots_per_rank]

    def replicas(self, layer: int, expert: int) -> list[int]:
        """Slots that hold `expert`, lowest first."""
        return np.flatnonzero(self.physical_to_logical_LP[layer] == expert).tolist()

    def slot_table(self, layer: int, source_rank: int) -> Int32:
        """The one replica of each expert that `source_rank` sends to: its own, else spread over sources by rank."""
        slots_per_rank = self.slots_per_rank
        table_E = np.empty(self.num_experts, np.int32)
        for expert, slots in self._slots_by_expert(layer):
            own = [slot for slot in slots if slot // slots_per_rank == source_rank]
            table_E[expert] = own[0] if own else slots[(source_rank + expert) % len(slots)]
        return table_E

    def slot_tables(self, source_rank: int) -> Int32:
        """`slot_table` of every layer, [L, E], in a fraction of the time."""
        physical_LP, num_experts = self.physical_to_logical_LP, self.num_experts
        layers_L1, experts_E = np.arange(self.num_layers)[:, None], np.arange(num_experts)
        slots_by_expert_LP = np.argsort(physical_LP, axis=1, kind="stable")  # lowest first; the empty before all
        counts_L1E = np.bincount(  # slots of none, then of each expert
            (physical_LP + 1 + layers_L1 * (num_experts + 1)).reshape(-1), minlength=self.num_layers * (num_experts + 1)
        ).reshape(self.num_layers, num_experts + 1)
        starts_LE = np.cumsum(counts_L1E, axis=1)[:, :-1]
        chosen_LE = starts_LE + (source_rank + experts_E) % counts_L1E[:, 1:]
        tables_LE = slots_by_expert_LP[layers_L1, chosen_LE].astype(np.int32)
        first = source_rank * self.slots_per_rank
        own_LS = physical_LP[:, first : first + self.slots_per_rank]
        layers, slots = np.nonzero(own_LS != EMPTY)
        tables_LE[layers, own_LS[layers, slots]] = first + slots
        return tables_LE

    def _slots_by_expert(self, layer: int) -> Iterator[tuple[int, list[int]]]:
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.physical_to_logical_LP[layer].tolist()):
            if expert != EMPTY:
                slots[expert].append(slot)
        return enumerate(slots)

    def remap(self, topk_ids_TK: Int32, layer: int, source_rank: int) -> Int32:
        """Logical ids -> slots, for tokens of `source_rank`. The hot path keeps `slot_table` and indexes it itself."""
        return self.slot_table(layer, source_rank)[topk_ids_TK]

    def to_json(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "num_ranks": self.num_ranks,
            "num_experts": self.num_experts,
            "physical_to_logical": self.physical_to_logical_LP.tolist(),
        }

    @classmethod
    def from_json(cls, value: object) -> ExpertMap:
        """The inverse of `to_json`; ConfigError for anything else."""
        match value:
            case {
                "epoch": int(epoch),
                "num_ranks": int(num_ranks),
                "num_experts": int(num_experts),
                "physical_to_logical": list(rows),
            }:
                pass
            case _:
                raise ConfigError(
                    "expert map: expected an object of epoch, num_ranks, num_experts and physical_to_logical"
                )
        try:
            physical = np.array(rows, dtype=np.int64)
        except (ValueError, TypeError, OverflowError):
            raise ConfigError("expert map: physical_to_logical must be rows of slots, all of one length") from None
        if physical.ndim != 2 or np.abs(physical).max(initial=0) > SLOTS_MAX:
            raise ConfigError("expert map: physical_to_logical must be rows of slots with small integers")
        return cls._make(epoch, num_ranks, num_experts, physical.astype(np.int32))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExpertMap:
        try:
            return cls.from_json(json.loads(Path(path).read_bytes()))
        except OSError as error:
            raise ConfigError(f"expert map {path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"expert map {path}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertMap)
            and (self.epoch, self.num_ranks, self.num_experts) == (other.epoch, other.num_ranks, other.num_experts)
            and np.array_equal(self.physical_to_logical_LP, other.physical_to_logical_LP)
        )

    def __hash__(self) -> int:
        return hash((self.epoch, self.num_ranks, self.num_experts, self.physical_to_logical_LP.tobytes()))
