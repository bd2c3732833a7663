"""A MoE layer's dispatch, experts and combine through any ExpertGroup, by the kernels' twin: `LayerRun`.

What a rank's tokens, experts and weights are follows from a seed alone, so ranks as threads, ranks as processes and a lone
rank can be compared to the bit.

Letters: T tokens, D hidden, F ffn, K top-k, E experts, R ranks, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts
from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.cuda.expert_group import ExpertGroup
from switchgear_runtime.cuda.flat_dispatch import FlatDispatch
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.row_payload import RowPayload

HIDDEN, FFN = 48, 24
NOWHERE = -1  # an expert, or a slot, of a pair that counts for nothing
TIMEOUT_S = 60.0


def kernels() -> Kernels:
    return Kernels("twin", torch.device("cpu"))


def payload(dtype: str = "auto") -> RowPayload:
    return RowPayload(kernels(), dtype, HIDDEN)


class LayerRun:
    """`num_ranks` ranks with random experts, replicas and tokens; one has no tokens, one expert is nearly everybody's, and some
    pairs have no slot."""

    def __init__(self, seed: int, num_ranks: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_ranks = num_ranks
        self.num_experts = int(rng.integers(3, 12))
        self.top_k = int(rng.integers(1, min(self.num_experts, 8) + 1))
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.w13_E = [(draw(2 * FFN, HIDDEN) * 0.2).bfloat16() for _ in range(self.num_experts)]
        self.w2_E = [(draw(HIDDEN, FFN) * 0.2).bfloat16() for _ in range(self.num_experts)]
        self.experts_RS = _random_map(rng, self.num_experts, num_ranks)
        self.slots_per_rank = self.experts_RS.shape[1]
        num_tokens_R = [int(rng.integers(0, 20)) for _ in range(num_ranks)]
        num_tokens_R[int(rng.integers(num_ranks))] = 0
        if num_ranks == 1:
            num_tokens_R = [17]
        self.h_R = [draw(num, HIDDEN) for num in num_tokens_R]
        hot = int(rng.integers(self.num_experts))
        self.ids_R = [_experts_of(rng, num, self.num_experts, self.top_k, hot) for num in num_tokens_R]
        self.weights_R = [torch.softmax(draw(num, self.top_k), -1) for num in num_tokens_R]
        for ids_TK in self.ids_R:
            ids_TK[rng.random(ids_TK.shape) < 0.05] = NOWHERE
        self.slots_R = [self._slots(rng, ids) for ids in self.ids_R]

    def _slots(self, rng: np.random.Generator, ids_TK: np.ndarray[Any, Any]) -> torch.Tensor:
        """A random replica for each pair."""
        flat = self.experts_RS.reshape(-1)
        holders = [np.flatnonzero(flat == expert) for expert in range(self.num_experts)]
        choose = lambda expert: NOWHERE if expert == NOWHERE else int(rng.choice(holders[expert]))  # noqa: E731
        slots = [list(map(choose, ids)) for ids in ids_TK.tolist()]
        return torch.tensor(slots, dtype=torch.int32).view(-1, self.top_k)

    def forward(self, group: ExpertGroup[Any], rank: int) -> torch.Tensor:
        """y_TD of the rank's tokens, by its group."""
        return self._through(group, rank, self.experts_RS[rank], self.slots_R[rank], self.slots_per_rank)

    def alone(self, rank: int) -> torch.Tensor:
        """The same on one rank that has every expert."""
        flat = FlatDispatch(kernels(), _Nowhere(), payload(), rank=0, num_ranks=1)
        ids_TK = torch.from_numpy(self.ids_R[rank].astype(np.int32)).view(-1, self.top_k)
        return self._through(flat, rank, np.arange(self.num_experts), ids_TK, self.num_experts)

    def _through(
        self,
        group: ExpertGroup[Any],
        rank: int,
        experts_S: np.ndarray[Any, Any],
        slots_TK: torch.Tensor,
        slots_per_rank: int,
    ) -> torch.Tensor:
        twin = kernels()
        addresses = lambda weights: torch.tensor(  # noqa: E731
            [weights[expert].data_ptr() if expert >= 0 else 0 for expert in experts_S.tolist()], dtype=torch.int64
        )
        handle = group.create_handle(slots_TK, slots_per_rank)
        received = group.dispatch(self.h_R[rank], handle, timeout_s=TIMEOUT_S)
        act_NF = twin.expert_gated_linear(received.x_MX, addresses(self.w13_E), FFN, received.groups)
        y_ND = twin.expert_linear(act_NF, addresses(self.w2_E), HIDDEN, received.groups)
        return group.combine(y_ND, self.weights_R[rank], handle, timeout_s=TIMEOUT_S)

    # --- what has to cross --------------------------------------------------------------------------------------------

    def pairs(self, rank: int) -> list[tuple[int, int]]:
        """(token, destination rank) of each of the rank's pairs."""
        return [
            (token, slot // self.slots_per_rank)
            for token, slots in enumerate(self.slots_R[rank].tolist())
            for slot in slots
            if slot != NOWHERE
        ]


class _Nowhere:
    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:  # noqa: ARG002
        return [Parts(data[begin:end], [0, end - begin]) for data, (begin, end) in send]


class Counting:
    """A DeviceExchange that counts: of each call, the bytes of each part that go to each rank."""

    def __init__(self, exchange: DeviceExchange) -> None:
        self._exchange = exchange
        self.calls: list[list[list[int]]] = []

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        self.calls.append([[end - begin for begin, end in pairwise(parts.offsets)] for parts in send])
        return self._exchange.exchange(send, timeout_s=timeout_s)


def _random_map(rng: np.random.Generator, num_experts: int, num_ranks: int) -> np.ndarray[Any, Any]:
    """[R, S] with replicas and empty slots (-1); no expert twice on a rank."""
    held: list[set[int]] = [set() for _ in range(num_ranks)]
    for expert in range(num_experts):
        for rank in rng.choice(num_ranks, int(rng.integers(1, num_ranks + 1)), replace=False):
            held[rank].add(expert)
    width = max(map(len, held)) + 1
    experts_RS = np.full((num_ranks, width), -1, np.int64)
    for rank, experts in enumerate(held):
        places = rng.permutation(width)[: len(experts)]
        experts_RS[rank, places] = sorted(experts)
    return experts_RS


def _experts_of(rng: np.random.Generator, num: int, num_experts: int, top_k: int, hot: int) -> np.ndarray[Any, Any]:
    ids = [rng.permutation(num_experts)[:top_k] for _ in range(num)]
    for row in ids:
        if hot not in row:
            row[int(rng.integers(top_k))] = hot
    return np.array(ids, np.int64).reshape(num, top_k)


def random_domains(rng: np.random.Generator, num_ranks: int) -> Domains:
    """Of any number, sizes and order."""
    return Domains.of([str(rng.integers(num_ranks)) for _ in range(num_ranks)])
