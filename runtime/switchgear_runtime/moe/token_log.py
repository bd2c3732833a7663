"""The experts of every token that a rank routes, in a file: `TokenLog`, for recordings with per-token ids.

The file is [T, L, K] little-endian uint16, token after token, and grows by a completed step at a time, before the
step's frame is sent. So once the server has a step's tokens, their routing can be read.

Letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError

Int32 = NDArray[np.int32]
UInt16 = NDArray[np.uint16]


class TokenLog:
    """One rank's. Of a step that breaks nothing is written."""

    def __init__(self, folder: str, rank: int, num_layers: int) -> None:
        self._layers: list[UInt16 | None] = [None] * num_layers
        try:
            self._file = log_path(folder, rank).open("wb")
        except OSError as error:
            raise ConfigError(f"routing_log={folder!r} cannot be written: {error.strerror}") from None

    def record(self, layer: int, topk_ids_TK: Int32) -> None:
        self._layers[layer] = topk_ids_TK.astype("<u2")

    def commit(self) -> None:
        layers = [ids_TK for ids_TK in self._layers if ids_TK is not None]
        if len(layers) == len(self._layers) and layers[0].size:
            self._file.write(np.stack(layers, axis=1).tobytes())
            self._file.flush()
        self.discard()

    def discard(self) -> None:
        self._layers = [None] * len(self._layers)


def log_path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.u16"


def num_logged_tokens(folder: str | Path, rank: int, num_layers: int, top_k: int) -> int:
    """So far."""
    path = log_path(folder, rank)
    return path.stat().st_size // (2 * num_layers * top_k) if path.exists() else 0


def read_log(folder: str | Path, rank: int, num_layers: int, top_k: int) -> UInt16:
    """[T, L, K]."""
    ids = np.fromfile(log_path(folder, rank), "<u2")
    return ids[: len(ids) // (num_layers * top_k) * num_layers * top_k].reshape(-1, num_layers, top_k)
