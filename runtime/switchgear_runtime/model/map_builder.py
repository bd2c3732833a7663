"""Makes what a rank computes with under an expert map and the model's versions: `MapBuilder`, whose work is StagedMaps.

What this rank holds already, of the same expert and the same file, is taken over; only the rest is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from switchgear_runtime.model.backend import Placing
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.model.staged_map import StagedMap, digest_of
from switchgear_runtime.model.weight_store import ExpertWeights, WeightStore
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.moe.experts import ExpertSlots
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.layer_placement import ExpertTensors, LayerPlacement, Source
from switchgear_runtime.moe.lent_experts import LentExperts
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions
from switchgear_runtime.moe.replica_choice import ReplicaChoice
from switchgear_runtime.moe.variants import Variants, variant_table

# (MoE layer, logical expert, the swap whose weights it has, None: the checkpoint's) -> packed weights
ReadExpert = Callable[[int, int, ExpertSwap | None], ExpertWeights]


class MapBuilder:
    """Of one rank. `build` runs in the thread that stages, or, while nobody stages, in the engine's."""

    def __init__(
        self,
        spec: DecoderSpec,
        store: WeightStore,
        layers: Sequence[MoELayer],
        choice: ReplicaChoice,
        native: Placing | None,
        *,
        rank: int,
    ) -> None:
        self._spec = spec
        self._store = store
        self._layers = layers
        self._choice = choice
        self._native = native
        self._rank = rank
        self._lent_L: list[LentExperts] | None = None  # the checkpoint's experts, once they were wanted
        self._lends = False

    def lend(self, wanted: bool) -> bool:
        """In the generation that begins: whether this rank has every expert's weights at hand, which takes no copy on
        one host, whose ranks map one file."""
        if wanted and self._lent_L is None:
            self._lent_L = self._find_lent()
        self._lends = wanted and self._lent_L is not None
        return self._lends

    def num_missing(self, expert_map: ExpertMap, versions: ModelVersions) -> int:
        """(layer, expert) pairs whose weights `build` would read."""
        num_missing = 0
        for index, layer in enumerate(self._layers):
            settled = versions.settled_of(index)
            wanted = {(swap.expert, swap.sha256) for swap in versions.live_of(index)}
            for expert in expert_map.local_experts(index, self._rank).tolist():
                if expert != EMPTY:
                    wanted.add((expert, settled[expert].sha256 if expert in settled else ""))
            held = set() if layer.placement is None else {source for source, _ in layer.placement.held()}
            num_missing += len(wanted - held)
        return num_missing

    def build(self, expert_map: ExpertMap, versions: ModelVersions, read: ReadExpert) -> StagedMap:
        """`read` gives the experts that this rank does not hold; what it raises passes through."""
        counter = _Counter(read, self._store)
        choice, num_variants, ffn = self._choice, versions.num_variants, self._spec.moe.ffn
        slot_tables = choice.strided(expert_map, expert_map.slot_tables(self._rank), num_variants)
        stride = choice.stride(expert_map, num_variants)
        layers = []
        for index, slot_table_E in enumerate(torch.from_numpy(slot_tables)):
            weights = _LayerWeights(index, self._layers[index].placement, versions.settled_of(index), counter)
            slots = ExpertSlots.load(
                expert_map.local_experts(index, self._rank),
                self._rank * stride,
                hidden=self._spec.hidden_size,
                ffn=ffn,
                format=self._store.expert_format,
                read=weights.of_slot,
                held=self._layers[index].experts,
                digests={expert: swap.sha256 for expert, swap in weights.settled.items()},
            )
            layers.append(
                LayerPlacement(
                    experts=slots,
                    slot_table_E=slot_table_E,
                    quotas=choice.quotas(expert_map, index, num_variants),
                    lent=choice.slots_for_lent(expert_map, self._lent(index, weights)),
                    variants=self._variants(index, versions, weights, stride - num_variants),
                )
            )
        return StagedMap(
            expert_map=expert_map,
            versions=versions,
            digest=digest_of(expert_map, versions),
            layers=layers,
            native=None if self._native is None else self._native.prepare(layers),
            num_new=counter.num_new,
            new_bytes=counter.new_bytes,
        )

    def _variants(
        self, layer: int, versions: ModelVersions, weights: _LayerWeights, first_slot: int
    ) -> Variants | None:
        if not versions.live:
            return None
        tensors = [weights.get(swap.expert, swap) for swap in versions.live_of(layer)]
        return Variants.of(versions, layer, tensors, variant_table(versions, layer, self._spec.num_experts, first_slot))

    def _lent(self, layer: int, weights: _LayerWeights) -> LentExperts | None:
        """Every rank that lends has the weights of all settled swaps, so that any of them may be lent to any rank."""
        if not self._lends:
            return None
        assert self._lent_L is not None
        swapped = {(expert, swap.sha256): weights.get(expert, swap) for expert, swap in weights.settled.items()}
        return self._lent_L[layer].with_swapped(swapped)

    def _find_lent(self) -> list[LentExperts] | None:
        lent_L = []
        for decoder_layer, layer in zip(self._spec.moe_layers, self._layers, strict=True):
            held = {} if layer.placement is None else dict(layer.placement.held())
            weights: list[ExpertTensors] = []
            for expert in range(self._spec.num_experts):
                found = held.get((expert, "")) or self._store.lendable(decoder_layer, expert)
                if found is None:
                    return None
                weights.append(found)
            lent_L.append(LentExperts.of([w13 for w13, _ in weights], [w2 for _, w2 in weights]))
        return lent_L


class _Counter:
    """Reads, and what they brought."""

    def __init__(self, read: ReadExpert, store: WeightStore) -> None:
        self._read = read
        self._store = store
        self.num_new = self.new_bytes = 0

    def __call__(self, layer: int, expert: int, swap: ExpertSwap | None) -> ExpertTensors:
        source = layer, expert, "" if swap is None else swap.sha256
        gate_up, down = self._store.on_device(self._read(layer, expert, swap), source)
        self.num_new += 1
        self.new_bytes += gate_up.data.nbytes + down.data.nbytes
        return gate_up.data, down.data


class _LayerWeights:
    """A layer's weights by expert and file: those that are held, and those that were read for this map."""

    def __init__(
        self, layer: int, placement: LayerPlacement | None, settled: dict[int, ExpertSwap], read: _Counter
    ) -> None:
        self.settled = settled
        self._layer = layer
        self._read = read
        self._known: dict[Source, ExpertTensors] = {} if placement is None else dict(placement.held())

    def of_slot(self, expert: int) -> ExpertTensors:
        return self.get(expert, self.settled.get(expert))

    def get(self, expert: int, swap: ExpertSwap | None) -> ExpertTensors:
        source = (expert, "" if swap is None else swap.sha256)
        if source not in self._known:
            self._known[source] = self._read(self._layer, expert, swap)
        return self._known[source]
