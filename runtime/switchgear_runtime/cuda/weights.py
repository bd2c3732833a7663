"""The weights of one rank on its device: `DeviceWeightStore`, matrices by name, as they lie in the checkpoint.

It is to the device engine what WeightStore is to the CPU's, and has its methods. A matrix [N, K] keeps its rows, since
the device's product takes them so: nothing is packed, and nothing is kept between starts. An expert is a tensor of its
own: a placement moves no other, and kernels find it by its address.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.model.blob_file import Pace
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import EMBEDDING, Matrix, expert_matrix_names, matrices
from switchgear_runtime.model.weight_store import ExpertWeights
from switchgear_runtime.ops import PackedWeight

ROW_BYTES = 16  # kernels read rows in pieces of so many
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class DeviceWeightStore:
    """The main thread, and one that stages experts."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        if dtype != torch.bfloat16:
            raise ConfigError(
                f"the device engine computes in bfloat16, and the model is {dtype}; give dtype='bfloat16'"
            )
        self.checkpoint = checkpoint
        self.device = device
        self.matrices = matrices(
            checkpoint.spec, checkpoint.names, lm_head=checkpoint.lm_head, dtype="bfloat16", quantization="none"
        )
        self._dense: dict[tuple[str, ...], Tensor] = {}  # by the tensors on disk
        self._lock = threading.Lock()
        # Experts that are staged are copied beside the steps, not between their kernels.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def expert_format(self) -> str:
        return "bf16"

    @property
    def shares_weights(self) -> bool:
        """No cache of the host's has them in this layout."""
        return False

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

    def expert(self, layer: int, expert: int, pace: Pace | None = None) -> ExpertWeights:
        """(gate and up, down) of one logical expert of decoder layer `layer`. `pace` is told of every piece read."""
        gate_up, down = (self.matrices[name] for name in expert_matrix_names(layer, expert))
        return self._read_expert(gate_up, pace), self._read_expert(down, pace)

    def empty_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Memory of the host for an expert that comes from another rank; `on_device` then takes it."""
        gate_up, down = (self.matrices[name] for name in expert_matrix_names(layer, expert))
        return self._empty(gate_up), self._empty(down)

    def pack_expert(self, layer: int, expert: int, gate_up_NK: Tensor, down_NK: Tensor) -> ExpertWeights:
        """Weights that are not the checkpoint's."""
        gate_up, down = (
            _weight(matrix, self._copied(self._checked(matrix, weight_NK.to(torch.bfloat16))), None)
            for matrix, weight_NK in zip(
                (self.matrices[name] for name in expert_matrix_names(layer, expert)), (gate_up_NK, down_NK), strict=True
            )
        )
        return gate_up, down

    def on_device(self, weights: ExpertWeights) -> ExpertWeights:
        """What `expert` gives already is; what came from elsewhere is copied."""
        gate_up, down = weights
        return self._taken(gate_up), self._taken(down)

    def to_host(self, weight: Tensor) -> Tensor:
        """The bytes of an expert's matrix, for another rank. Not a view where there is a device."""
        return weight.cpu().reshape(-1).view(torch.uint8)

    def _empty(self, matrix: Matrix) -> PackedWeight:
        return _weight(matrix, torch.empty(matrix.num_out * matrix.num_k * 2, dtype=torch.uint8), None)

    def _taken(self, weight: PackedWeight) -> PackedWeight:
        if weight.data.dtype != torch.uint8:
            return weight
        data = weight.data.view(_DTYPES[weight.format]).view(weight.num_out, weight.num_k)
        return PackedWeight(
            data=self._copied(data),
            format=weight.format,
            num_out=weight.num_out,
            num_k=weight.num_k,
            gate_up=weight.gate_up,
        )

    def _matrix(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        with self._lock:
            if matrix.tensors not in self._dense:  # tied embeddings are one tensor
                self._dense[matrix.tensors] = self._copied(self._checked(matrix, self._on_disk(matrix)))
            return self._dense[matrix.tensors]

    def _read_expert(self, matrix: Matrix, pace: Pace | None) -> PackedWeight:
        if pace is not None:
            pace(matrix.num_out * matrix.num_k * 2)
        return _weight(matrix, self._copied(self._checked(matrix, self._on_disk(matrix))), None)

    def _copied(self, weight: Tensor) -> Tensor:
        """On the device and in memory of its own, complete."""
        if self._stream is None:
            return weight.to(self.device).clone()
        with torch.cuda.stream(self._stream):
            copied = weight.to(self.device)
        self._stream.synchronize()
        return copied

    def _on_disk(self, matrix: Matrix) -> Tensor:
        if matrix.expert is not None:
            read = self.checkpoint.expert_gate_up if matrix.gate_up else self.checkpoint.expert_down
            weight_NK = read(*matrix.expert)
        else:
            tensors = [self.checkpoint.tensor(name) for name in matrix.tensors]
            weight_NK = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return weight_NK.to(_DTYPES[matrix.format])

    def _checked(self, matrix: Matrix, weight_NK: Tensor) -> Tensor:
        if weight_NK.shape[1] * weight_NK.element_size() % ROW_BYTES:
            raise CheckpointError(
                f"{self.checkpoint.model_dir}: {matrix.name} has {weight_NK.shape[1]} inputs; the device engine takes "
                f"multiples of {ROW_BYTES // weight_NK.element_size()}: use device='cpu'"
            )
        return weight_NK


def _weight(matrix: Matrix, data: Tensor, bias_N: Tensor | None) -> PackedWeight:
    return PackedWeight(
        data=data,
        format=matrix.format,
        num_out=matrix.num_out,
        num_k=matrix.num_k,
        gate_up=matrix.gate_up,
        bias_N=bias_N,
    )
