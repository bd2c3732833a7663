"""The ranks' token logs, cut into windows: `WindowedLog`.

Letters: W windows, S source ranks, T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import numpy as np

from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.routing_trace import TokenRoutes
from switchgear_runtime.moe.token_log import num_logged_tokens, read_log


class WindowedLog:
    """`end_window` between windows, when no step runs. Without a folder there is nothing to read."""

    def __init__(self, folder: str | None, num_ranks: int, spec: DecoderSpec) -> None:
        self._folder = folder
        self._ranks = range(num_ranks)
        self._shape = (spec.num_moe_layers, spec.moe.top_k)
        self._ends_WS = [[0] * num_ranks]

    def end_window(self) -> None:
        if self._folder is not None:
            self._ends_WS.append([num_logged_tokens(self._folder, rank, *self._shape) for rank in self._ranks])

    def tokens(self) -> TokenRoutes | None:
        if self._folder is None:
            return None
        ids_of_rank = [read_log(self._folder, rank, *self._shape) for rank in self._ranks]
        ends_WS = np.array(self._ends_WS, np.int64)
        parts = [
            ids_of_rank[rank][begin:end]
            for begins, ends in zip(self._ends_WS, self._ends_WS[1:], strict=False)
            for rank, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        return TokenRoutes(num_tokens_WS=np.diff(ends_WS, axis=0), topk_ids_TLK=np.concatenate(parts))
