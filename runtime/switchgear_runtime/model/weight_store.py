"""The packed weights of one rank: `WeightStore`, matrices by name from the weight cache, packed from the checkpoint once.

Only what is asked for is read or packed, so a rank touches the bytes of its own experts only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import EMBEDDING, Matrix, expert_matrix_names, matrices
from switchgear_runtime.model.weight_cache import (
    SHARED_BYTES_MIN,
    WeightCache,
    WeightCacheKey,
    weight_cache_folder,
)
from switchgear_runtime.packing import pack_version

ExpertWeights = tuple[ops.PackedWeight, ops.PackedWeight]  # gate and up, down


class WeightStore:
    """One thread at a time. `weight_cache`: EngineConfig's setting of that name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        *,
        quantization: str = "none",
        weight_cache: str | None = "",
        rank: int = 0,
    ) -> None:
        if checkpoint.spec.quantization is not None:
            raise ConfigError(
                f"{checkpoint.model_dir} has {checkpoint.spec.quantization} weights, which CPUs have no product of; use "
                "device='cuda', or a checkpoint in bfloat16"
            )
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.matrices = matrices(
            checkpoint.spec,
            checkpoint.names,
            lm_head=checkpoint.lm_head,
            dtype=str(dtype).removeprefix("torch."),
            quantization=quantization,
        )
        formats = (matrix.format for matrix in self.matrices.values() if matrix.expert is not None)
        self.expert_format = next(formats)  # of all routed experts (packing.FORMATS)
        key = WeightCacheKey.of(checkpoint, format=f"{dtype} {quantization}", layout=pack_version())
        blobs = {name: matrix.num_bytes for name, matrix in self.matrices.items()}
        self.cache = WeightCache.open(weight_cache_folder(weight_cache), key, blobs, rank=rank)
        self._mapped_experts: dict[tuple[int, int], ExpertWeights] = {}  # by (layer, expert); views

    def prepare(self, names: Iterable[str]) -> None:
        """Pack what no rank of this host has packed yet; ranks that start together share the work."""
        self.cache.prepare({name: partial(self._fill, self.matrices[name]) for name in names})

    def publish(self) -> None:
        """After loading: lets go of the checkpoint's pages and of scratch memory."""
        self.cache.publish()
        self.checkpoint.release()

    def dense_names(self) -> list[str]:
        """Of everything but the routed experts."""
        return [name for name, matrix in self.matrices.items() if matrix.expert is None]

    def embedding(self) -> Tensor:
        """[V, D] in the run's dtype. Not to be written to."""
        matrix = self.matrices[EMBEDDING]
        data = self.cache.get(EMBEDDING, partial(self._fill, matrix))
        return data.view(self.dtype).view(matrix.num_out, matrix.num_k)

    def matrix(self, name: str, bias_N: Tensor | None = None, pace: Pace | None = None) -> ops.PackedWeight:
        matrix = self.matrices[name]
        return _weight(matrix, self.cache.get(name, partial(self._fill, matrix), pace), bias_N)

    def expert(self, layer: int, expert: int, pace: Pace | None = None) -> ExpertWeights:
        """(gate and up, down) of one logical expert of decoder layer `layer`. `pace` is told of every piece read."""
        gate_up, down = expert_matrix_names(layer, expert)
        known = self._mapped_experts.get((layer, expert))
        if known is not None:  # an expert that comes back
            self.cache.touch(gate_up, down, pace)
            return known
        num_private = self.cache.num_private
        weights = self.matrix(gate_up, pace=pace), self.matrix(down, pace=pace)
        if self.cache.num_private == num_private:
            self._mapped_experts[layer, expert] = weights
        return weights

    @property
    def shares_weights(self) -> bool:
        """Whether every matrix of the model is a page of this host's cache away."""
        return self.cache.is_shared

    @property
    def pool_slots(self) -> int | None:
        """How many experts there is memory for; None: what the host has."""
        return None

    def reserve(self, num_slots: int, *, num_new: int, beside_bytes: int = 0) -> None:
        """Memory of the host is taken as it is needed."""

    def on_device(self, weights: ExpertWeights, source: tuple[int, int, str]) -> ExpertWeights:  # noqa: ARG002
        """Where they are computed with: here. `source`: MoE layer, expert, and the file of its weights (sha256)."""
        return weights

    def to_host(self, weight: Tensor) -> Tensor:
        """The bytes of an expert's matrix, for another rank."""
        return weight

    def lendable(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:
        """The packed weights of an expert of any rank, to be read in place; None where they are not on this host yet.
        A model too small for the cache is packed here."""
        if not self.cache.is_shared:
            if self.cache.num_bytes >= SHARED_BYTES_MIN:
                return None
            gate_up, down = self.expert(layer, expert)
            return gate_up.data, down.data
        w13, w2 = (self.cache.peek(name) for name in expert_matrix_names(layer, expert))
        return None if w13 is None or w2 is None else (w13, w2)

    def empty_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Memory of its own for an expert whose packed weights come from elsewhere; arbitrary contents."""
        matrices = [self.matrices[name] for name in expert_matrix_names(layer, expert)]
        gate_up, down = (_weight(matrix, self.cache.pool.take(matrix.num_bytes)) for matrix in matrices)
        return gate_up, down

    def pack_expert(self, layer: int, expert: int, gate_up_NK: Tensor, down_NK: Tensor) -> ExpertWeights:
        """Weights that are not the checkpoint's, packed as its own expert's are; in memory of this rank."""
        weights = self.empty_expert(layer, expert)
        for name, tensor_NK, weight in zip(
            expert_matrix_names(layer, expert), (gate_up_NK, down_NK), weights, strict=True
        ):
            self._pack(self.matrices[name], tensor_NK, weight.data)
        return weights

    def _fill(self, matrix: Matrix, out: Tensor) -> None:
        weight_NK = self._read(matrix)
        if matrix.name == EMBEDDING:
            out.view(self.dtype).view(weight_NK.shape).copy_(weight_NK)
            return
        self._pack(matrix, weight_NK, out)

    def _pack(self, matrix: Matrix, weight_NK: Tensor, out: Tensor) -> None:
        if weight_NK.dtype == torch.float16:
            weight_NK = weight_NK.float()
        try:
            ops.pack_into(out, weight_NK.contiguous(), matrix.format, gate_up=matrix.gate_up)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.model_dir}: {matrix.name}: {error}") from None

    def _read(self, matrix: Matrix) -> Tensor:
        if matrix.expert is not None:
            read = self.checkpoint.expert_gate_up if matrix.gate_up else self.checkpoint.expert_down
            return read(*matrix.expert)
        tensors = [self.checkpoint.tensor(name) for name in matrix.tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _weight(matrix: Matrix, data: Tensor, bias_N: Tensor | None = None) -> ops.PackedWeight:
    return ops.PackedWeight(
        data=data,
        format=matrix.format,
        num_out=matrix.num_out,
        num_k=matrix.num_k,
        gate_up=matrix.gate_up,
        bias_N=bias_N,
    )
