"""What a step on a device needs from the host, in one copy: `StepInputs`, arrays side by side in pinned memory.

Its sizes are room: what a step does not fill is padding that does no harm (token 0 at position 0 of the first sequence,
whose key and value are not kept), and `num_tokens_now` tells how many tokens are none.

Letters: T tokens, Q sequences, B block-table width, S rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchgear_runtime.batch import FlatBatch
from switchgear_runtime.block_tables import fill, width_of
from switchgear_runtime.cuda.attention_packing import Tiles
from switchgear_runtime.sampler import signed_seed, top_k_or_all
from switchgear_runtime.sequence import Sequence as TokenSequence

ALIGNMENT = 64
NO_SLOT = -1  # key and value are not kept
NO_TOKEN = -1  # in alone_N
KNOWN = -1  # in from_T


@dataclass(frozen=True, slots=True)
class InputShape:
    """Room. `table_width`: blocks of a sequence."""

    num_tokens: int
    num_seqs: int
    table_width: int
    num_rows: int
    num_tiles: int = 0  # of attention; without any, no token is named as alone, since all are
    num_alone: int = 0

    @classmethod
    def of(cls, flat: FlatBatch, tiles: Tiles) -> InputShape:
        """Exactly as much."""
        tables, num_tiles = flat.block_tables_S, len(tiles.tiles_N2)
        return cls(
            len(flat.token_ids_T),
            len(tables),
            width_of(tables),
            len(flat.sampling_rows),
            num_tiles,
            len(tiles.alone_N) if num_tiles else 0,
        )

    def arrays(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        tokens, rows = (self.num_tokens,), (self.num_rows,)
        return {
            "token_ids_T": (np.int64, tokens),
            "positions_T": (np.int64, tokens),
            "slots_T": (np.int64, tokens),
            "seeds_S": (np.int64, rows),
            "draws_S": (np.int64, rows),  # index of the token that is drawn
            "from_T": (np.int32, tokens),  # row of the step before that drew this token; KNOWN: it is in token_ids_T
            "seq_ids_T": (np.int32, tokens),
            "tenant_rows_T": (np.int32, tokens),
            "versions_T": (np.int32, tokens),
            "block_tables_QB": (np.int32, (self.num_seqs, self.table_width)),
            "tiles_N2": (np.int32, (self.num_tiles, 2)),
            "alone_N": (np.int32, (self.num_alone,)),
            "rows_S": (np.int32, rows),  # tokens whose successor is drawn
            "top_k_S": (np.int32, rows),
            "temperature_S": (np.float32, rows),
            "top_p_S": (np.float32, rows),
            "min_p_S": (np.float32, rows),
            "num_tokens_now": (np.int32, (1,)),
        }


class StepInputs:
    """`fill`, then copy `host` to `on_device`, which is what kernels read: `inputs["token_ids_T"]`. The same shape twice,
    with one `on_device`, is a step's and its successor's."""

    def __init__(self, shape: InputShape, device: torch.device, on_device: Tensor | None = None) -> None:
        self.shape = shape
        places: dict[str, tuple[int, type[np.generic], tuple[int, ...]]] = {}
        num_bytes = 0
        for name, (dtype, dims) in shape.arrays().items():
            places[name] = (num_bytes, dtype, dims)
            num_bytes += -(-prod(dims) * dtype().itemsize // ALIGNMENT) * ALIGNMENT
        self.host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.on_device = torch.zeros_like(self.host, device=device) if on_device is None else on_device
        raw = self.host.numpy()
        self._arrays: dict[str, NDArray[Any]] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, (begin, dtype, dims) in places.items():
            end = begin + prod(dims) * dtype().itemsize
            self._arrays[name] = raw[begin:end].view(dtype).reshape(dims)
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            self._tensors[name] = self.on_device[begin:end].view(kind).view(dims)

    def __getitem__(self, name: str) -> Tensor:
        """On the device."""
        return self._tensors[name]

    def fill(
        self,
        flat: FlatBatch,
        sampled: Sequence[TokenSequence],
        tenant_rows_T: NDArray[np.int32],
        no_tenant: int,
        versions_T: NDArray[np.int32] | None,
        tiles: Tiles,
    ) -> None:
        """`sampled`: those of flat.sampling_rows. A token id below 0 is that of row -1 - id of the step before.
        `no_tenant`: where padding is counted."""
        arrays, num_tokens = self._arrays, len(flat.token_ids_T)
        ids_T = np.array(flat.token_ids_T, np.int64)
        _put(arrays["token_ids_T"], np.maximum(ids_T, 0), 0)
        _put(arrays["from_T"], np.where(ids_T < 0, -1 - ids_T, KNOWN), KNOWN)
        _put(arrays["positions_T"], flat.positions_T, 0)
        _put(arrays["slots_T"], flat.slots_T, NO_SLOT)
        _put(arrays["seq_ids_T"], flat.seq_ids_T, 0)
        _put(arrays["tenant_rows_T"], tenant_rows_T, no_tenant)
        _put(arrays["versions_T"], () if versions_T is None else versions_T, 0)
        fill(arrays["block_tables_QB"], flat.block_tables_S)
        arrays["num_tokens_now"][0] = num_tokens
        if self.shape.num_tiles:
            padding = np.arange(num_tokens, self.shape.num_tokens)  # attends alone, too: its rows must be numbers
            _put(arrays["tiles_N2"], tiles.tiles_N2, 0)
            _put(arrays["alone_N"], np.concatenate([tiles.alone_N, padding]), NO_TOKEN)
        _put(arrays["rows_S"], flat.sampling_rows, 0)
        sampling = [sequence.sampling for sequence in sampled]
        _put(arrays["seeds_S"], [signed_seed(params.seed) for params in sampling], 0)
        _put(arrays["draws_S"], [sequence.num_output_tokens for sequence in sampled], 0)
        _put(arrays["top_k_S"], [top_k_or_all(params.top_k) for params in sampling], 0)
        _put(arrays["temperature_S"], [params.temperature for params in sampling], 0.0)
        _put(arrays["top_p_S"], [params.top_p for params in sampling], 1.0)
        _put(arrays["min_p_S"], [params.min_p for params in sampling], 0.0)


def _put(array: NDArray[Any], values: Any, padding: float) -> None:
    array[: len(values)] = values
    array[len(values) :] = padding
