"""A checkpoint's matrices as a device keeps them: `WeightSource`, which reads them on the host.

bf16 lies as in the checkpoint, [N, K]; routers are fp32; fp8 (fp8.py) is one piece of codes and scales, the checkpoint's own,
or made here from bf16. What an fp8 checkpoint leaves in bf16 stays so.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from switchgear_runtime.cuda.fp8 import FP8, join_fp8, quantize_fp8
from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.matrices import Matrix, matrices
from switchgear_runtime.weight_format import FP8_BLOCK

ROW_BYTES = 16  # kernels read rows in pieces of so many
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}


class WeightSource:
    """`quantization`: the setting. CheckpointError names what cannot be served."""

    def __init__(self, checkpoint: Checkpoint, quantization: str) -> None:
        self._checkpoint = checkpoint
        known = matrices(
            checkpoint.spec,
            checkpoint.names,
            lm_head=checkpoint.lm_head,
            dtype="bfloat16",
            quantization=quantization,
        )
        self.matrices = {name: self._as_kept(matrix) for name, matrix in known.items()}
        formats = {matrix.format for matrix in self.matrices.values() if matrix.expert is not None}
        if len(formats) > 1:
            raise CheckpointError(f"{checkpoint.model_dir}: some experts are fp8 and others are not")
        self.expert_format: str = formats.pop()

    def read(self, matrix: Matrix) -> Tensor:
        """Of the checkpoint."""
        if matrix.format == "fp8" and self._checkpoint.spec.quantization == "fp8":
            return self._joined(matrix)
        return self.kept(matrix, self._on_disk(matrix))

    def kept(self, matrix: Matrix, weight_NK: Tensor) -> Tensor:
        """A weight of any precision in the matrix's format."""
        self._check_rows(matrix, weight_NK.shape[1])
        if matrix.format != "fp8":
            return weight_NK.to(DTYPES[matrix.format])
        try:
            return quantize_fp8(weight_NK.bfloat16())
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.model_dir}: {matrix.name}: {error}") from None

    def _tensors(self, matrix: Matrix) -> tuple[str, ...]:
        """Their names on disk."""
        if matrix.expert is None:
            return matrix.tensors
        gate, up, down = self._checkpoint.names.expert(*matrix.expert)
        return (gate, up) if matrix.gate_up else (down,)

    def _as_kept(self, matrix: Matrix) -> Matrix:
        """With the format that an fp8 checkpoint really has it in."""
        if matrix.format != "fp8" or self._checkpoint.spec.quantization is None:
            return matrix
        are_fp8 = {self._checkpoint.is_fp8(name) for name in self._tensors(matrix)}
        if len(are_fp8) > 1:
            raise CheckpointError(f"{self._checkpoint.model_dir}: of {matrix.name} one part is fp8 and another is not")
        return matrix if are_fp8.pop() else replace(matrix, format="bf16")

    def _joined(self, matrix: Matrix) -> Tensor:
        """As the checkpoint has it: codes and scales of its parts, one below the other."""
        names = self._tensors(matrix)
        codes, scales = zip(*(self._checkpoint.fp8(name) for name in names), strict=True)
        self._check_rows(matrix, codes[0].shape[1])
        for name, part in zip(names[:-1], codes[:-1], strict=True):
            if part.shape[0] % FP8_BLOCK:
                raise CheckpointError(
                    f"{self._checkpoint.model_dir}: {name} has {part.shape[0]} rows, no multiple of {FP8_BLOCK}; the next "
                    "one's scales do not fit under its own"
                )
        return join_fp8(torch.cat([part.view(torch.uint8) for part in codes]), torch.cat(scales))

    def _on_disk(self, matrix: Matrix) -> Tensor:
        checkpoint = self._checkpoint
        if matrix.expert is not None:
            return (checkpoint.expert_gate_up if matrix.gate_up else checkpoint.expert_down)(*matrix.expert)
        tensors = [checkpoint.tensor(name) for name in matrix.tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def _check_rows(self, matrix: Matrix, num_k: int) -> None:
        of_row = ROW_BYTES // DTYPES[matrix.format].itemsize
        if num_k % of_row:
            raise CheckpointError(
                f"{self._checkpoint.model_dir}: {matrix.name} has {num_k} inputs; the device engine takes multiples of "
                f"{of_row}{' of fp8' if matrix.format == 'fp8' else ''}: use device='cpu'"
            )


def as_matrix(matrix: Matrix, raw: Tensor) -> Tensor:
    """Bytes as what they are."""
    data = raw.view(DTYPES[matrix.format])
    return data if matrix.format == "fp8" else data.view(matrix.num_out, matrix.num_k)
