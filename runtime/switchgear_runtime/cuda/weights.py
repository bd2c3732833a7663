"""The weights of one rank on its device: `DeviceWeightStore`, matrices by name, as they lie in the checkpoint.

It is to the device engine what WeightStore is to the CPU's, and has its methods. A matrix [N, K] keeps its rows, since
the device's product takes them so: nothing is packed, and nothing is kept between starts. An expert lies in a slot of a
pool: a placement moves no other, and kernels, of this rank or another, find it by its address.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from switchgear_runtime.comm.peer_memory import PeerMemory
from switchgear_runtime.cuda.device_footprint import matrix_bytes
from switchgear_runtime.cuda.device_memory import DeviceMemory
from switchgear_runtime.cuda.expert_pool import ExpertPool, Slot, Source
from switchgear_runtime.cuda.side_copies import SideCopies
from switchgear_runtime.cuda.slot_layout import SlotLayout
from switchgear_runtime.cuda.weight_source import WeightSource, as_matrix
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import EMBEDDING, Matrix, expert_matrix_names
from switchgear_runtime.model.weight_store import ExpertWeights
from switchgear_runtime.ops import PackedWeight

FREED_WITHIN_S = 10.0  # by processes that have ended
log = logging.getLogger(__name__)


class DeviceWeightStore:
    """The main thread, and one that stages experts. `memory`: that of the experts, which other ranks may map."""

    shares_weights = False  # no cache of the host's has them in this layout

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        memory: PeerMemory | None,
        copies: SideCopies,
        *,
        quantization: str = "none",
    ) -> None:
        if dtype != torch.bfloat16:
            raise ConfigError(
                f"the device engine computes in bfloat16, and the model is {dtype}; give dtype='bfloat16'"
            )
        self.checkpoint = checkpoint
        self.device = copies.device
        self._source = WeightSource(checkpoint, quantization)
        self.matrices = self._source.matrices
        self._dense: dict[tuple[str, ...], Tensor] = {}  # by the tensors on disk
        self._lock = threading.Lock()
        self._copies = copies
        part_bytes = tuple(map(matrix_bytes, self._expert_matrices(checkpoint.spec.moe_layers[0], 0)))
        self.pool = ExpertPool(SlotLayout(part_bytes), memory, copies)

    @property
    def expert_format(self) -> str:
        return self._source.expert_format

    @property
    def pool_slots(self) -> int | None:
        """How many experts there is memory for."""
        return self.pool.num_slots

    def reserve(self, num_slots: int, *, num_new: int, beside_bytes: int = 0) -> None:
        """Memory for so many experts in all, at least for `num_new` more. The first call comes before anything is loaded
        and wants everything, with `beside_bytes` for what is no weight; a later one (ranks are gone, and their experts
        come here) takes what the device can spare, and needs the new ones. ConfigError where it does not fit."""
        pool, size = self.pool, self.pool.layout.num_bytes
        needed = max(0, num_new - pool.num_free)
        wanted = max(num_slots - pool.num_slots, needed)
        is_first = not pool.num_slots
        memory = DeviceMemory.of(self.device)
        if not is_first and wanted > needed and not memory.can_spare(wanted * size):
            log.warning(
                "%s has no memory for %d expert slots more; larger maps will be refused", memory.name, wanted - needed
            )
            wanted = needed
        if not wanted:
            return
        dense = {matrix.tensors: matrix_bytes(matrix) for matrix in self.matrices.values() if matrix.expert is None}
        beside = {"dense weights": sum(dense.values()), "KV cache": beside_bytes} if is_first else {}
        parts = {f"{wanted} expert slots": wanted * size, **beside}
        if is_first:
            memory = memory.after_others(sum(parts.values()), timeout_s=FREED_WITHIN_S)
        memory.require(
            parts,
            "use more ranks, lower survive, or lower gpu_memory_utilization or kv_cache_memory_bytes; ranks that share a GPU need a "
            "part each",
        )
        try:
            pool.grow(wanted)
        except (RuntimeError, MemoryError, OSError) as error:  # torch's and CuPy's are RuntimeErrors
            raise ConfigError(
                f"{memory.name} gives no memory for {wanted} expert slots ({error}): lower survive"
            ) from None

    def prepare(self, names: Iterable[str]) -> None:
        """Nothing is packed beforehand."""

    def publish(self) -> None:
        """After loading: lets go of the checkpoint's pages."""
        self.checkpoint.release()

    def dense_names(self) -> list[str]:
        return [name for name, matrix in self.matrices.items() if matrix.expert is None]

    def embedding(self) -> Tensor:
        return self._matrix(EMBEDDING)

    def matrix(self, name: str, bias_N: Tensor | None = None) -> PackedWeight:
        """`data`: [N, K] on the device."""
        return _weight(self.matrices[name], self._matrix(name), bias_N)

    # --- experts ----------------------------------------------------------------------------------------------------

    def expert(self, layer: int, expert: int, pace: Pace | None = None) -> ExpertWeights:
        """(gate and up, down) of one logical expert of decoder layer `layer`. `pace` is told of every piece."""
        found = self._expert_matrices(layer, expert)
        return self._fill(found, (_bytes(self._source.read(matrix)) for matrix in found), pace)

    def empty_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Memory of the host for an expert that comes from another rank's host; `on_device` then takes it."""
        is_pinned = self.device.type == "cuda"
        gate_up, down = (
            _weight(matrix, torch.empty(matrix_bytes(matrix), dtype=torch.uint8, pin_memory=is_pinned))
            for matrix in self._expert_matrices(layer, expert)
        )
        return gate_up, down

    def pack_expert(self, layer: int, expert: int, gate_up_NK: Tensor, down_NK: Tensor) -> ExpertWeights:
        """Weights that are not the checkpoint's."""
        found = self._expert_matrices(layer, expert)
        weights = zip(found, (gate_up_NK, down_NK), strict=True)
        return self._fill(found, (_bytes(self._source.kept(matrix, weight_NK)) for matrix, weight_NK in weights))

    def in_slot(self, layer: int, expert: int, slot: Slot) -> ExpertWeights:
        """What has come into a slot by another way."""
        gate_up, down = map(_in_part, self._expert_matrices(layer, expert), slot.parts)
        return gate_up, down

    def on_device(self, weights: ExpertWeights, source: Source) -> ExpertWeights:
        """Complete, in a slot that says so. What `expert` gives is there already; what came from elsewhere is copied."""
        gate_up, down = weights
        if gate_up.data.dtype == torch.uint8:
            matrices_ = self._expert_matrices(self.checkpoint.spec.moe_layers[source[0]], source[1])
            gate_up, down = self._fill(matrices_, (weight.data for weight in weights))
        self.pool.stamp(gate_up.data, source)
        return gate_up, down

    def to_host(self, weight: Tensor) -> Tensor:
        """The bytes of an expert's matrix, for another rank. Not a view where there is a device."""
        return _bytes(weight.cpu())

    def lendable(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """Experts of other ranks are not this store's (MappedExperts)."""
        return None

    def _expert_matrices(self, layer: int, expert: int) -> tuple[Matrix, Matrix]:
        gate_up, down = (self.matrices[name] for name in expert_matrix_names(layer, expert))
        return gate_up, down

    def _fill(self, found: tuple[Matrix, Matrix], weights: Iterator[Tensor], pace: Pace | None = None) -> ExpertWeights:
        """`weights`: their bytes, on the host, each read when the one before has been copied."""
        slot = self.pool.take(pace)
        for part, weight in zip(slot.parts, weights, strict=True):
            self._copies.write(part, weight, pace)
        gate_up, down = map(_in_part, found, slot.parts)
        return gate_up, down

    # --- matrices ---------------------------------------------------------------------------------------------------

    def _matrix(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        with self._lock:
            if matrix.tensors not in self._dense:  # tied embeddings are one tensor
                self._dense[matrix.tensors] = self._source.read(matrix).to(self.device, copy=True)
            return self._dense[matrix.tensors]


def _in_part(matrix: Matrix, part: Tensor) -> PackedWeight:
    """A part of a slot as what its bytes are."""
    return _weight(matrix, as_matrix(matrix, part))


def _bytes(weight: Tensor) -> Tensor:
    return weight.contiguous().reshape(-1).view(torch.uint8)


def _weight(matrix: Matrix, data: Tensor, bias_N: Tensor | None = None) -> PackedWeight:
    return PackedWeight(
        data=data,
        format=matrix.format,
        num_out=matrix.num_out,
        num_k=matrix.num_k,
        gate_up=matrix.gate_up,
        bias_N=bias_N,
    )
