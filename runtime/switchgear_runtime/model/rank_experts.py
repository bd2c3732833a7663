"""Single experts of one rank, by MoE layer, number and file: `RankExperts`, where they come from and who may have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.expert_file import read_expert_file
from switchgear_runtime.model.swap_files import SwapFiles
from switchgear_runtime.model.weight_store import ExpertWeights
from switchgear_runtime.moe.layer import MoELayer
from switchgear_runtime.moe.layer_placement import ExpertTensors
from switchgear_runtime.moe.model_versions import ExpertSwap


class RankExperts:
    """`store`: a WeightStore, or a device's; `peers`: a device's MappedExperts. The thread that stages, or, while nobody
    stages, the engine's; `held` from any."""

    def __init__(
        self, store: Any, peers: Any, checkpoint: Checkpoint, layers: Sequence[MoELayer], files: Path | None
    ) -> None:
        self._store = store
        self._peers = peers
        self._checkpoint = checkpoint
        self._layers = layers
        self._decoder_layers = checkpoint.spec.moe_layers  # of each MoE layer; the spec counts them anew each time
        self._swap_files = SwapFiles(files)

    @property
    def shares_weights(self) -> bool:
        """Whether every expert of the model is a page of this host's weight cache away."""
        return bool(self._store.shares_weights)

    @property
    def reads_peers(self) -> bool:
        """Whether the other ranks' memory may be mapped here (`pull`), as on devices."""
        return self._peers is not None

    def read(
        self, moe_layer: int, expert: int, swap: ExpertSwap | None = None, pace: Pace | None = None
    ) -> ExpertWeights:
        """From the host's weight cache, or else packed from the checkpoint; with `swap`, from its file. `pace` is told of
        every piece."""
        layer = self._decoder_layers[moe_layer]
        weights: ExpertWeights
        if swap is None:
            weights = self._store.expert(layer, expert, pace)
        else:
            checkpoint = self._checkpoint
            tensors = read_expert_file(swap, checkpoint.spec, checkpoint.names, pace, self._swap_files)
            weights = self._store.pack_expert(layer, expert, *tensors)
        return weights

    def pull(self, peer: int, moe_layer: int, expert: int, swap: ExpertSwap | None, pace: Pace) -> ExpertWeights | None:
        """A copy out of the memory of rank `peer`, which computes with it; None where that is not mapped here. Raises
        TransportError where the peer has given it up, and what `pace` raises."""
        source = moe_layer, expert, "" if swap is None else swap.sha256
        slot = None if self._peers is None else self._peers.pull(peer, source, pace)
        return None if slot is None else self._store.in_slot(self._decoder_layers[moe_layer], expert, slot)

    def empty(self, moe_layer: int, expert: int) -> ExpertWeights:
        """Memory of the host for an expert that comes from elsewhere."""
        weights: ExpertWeights = self._store.empty_expert(self._decoder_layers[moe_layer], expert)
        return weights

    def held(self, moe_layer: int, expert: int, sha256: str = "") -> ExpertTensors | None:
        """The packed weights (gate and up, down) of an expert, those of the checkpoint or of the file with this digest,
        if this rank computes with them now."""
        placement = self._layers[moe_layer].placement
        found = None if placement is None else placement.find(expert, sha256)
        if found is None:
            return None
        gate_up, down = found
        return self._store.to_host(gate_up), self._store.to_host(down)
