"""A deep_ep of one process, for ranks that are threads: what DeepEp calls, with the names and order of deep_ep 2.1.0.

As the real one: rows arrive in no order within an expert, what is allocated is the worst case, and what nobody wrote is
garbage. Its combine is the real one's, too, with what makes a sum depend on placement; so a use that sums would show.
"""

# ruff: noqa: ARG002 - the real signatures, used or not
from __future__ import annotations

import random
import threading
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GARBAGE = 1e30


class EPHandle:
    def __init__(self, num_experts: int, topk_idx: Tensor, psum: Tensor, sources: list[tuple[int, int, int]]) -> None:
        self.num_experts = num_experts
        self.topk_idx = topk_idx
        self.psum_num_recv_tokens_per_expert = psum
        self.sources = sources  # (rank, token, k) of each row


class Hub:
    """Where the ranks meet. `calls`: of each rank, what it asked for."""

    def __init__(self, num_ranks: int, seed: int = 0) -> None:
        self.num_ranks = num_ranks
        self.calls: list[list[str]] = [[] for _ in range(num_ranks)]
        self._rng = random.Random(seed)
        self._barrier = threading.Barrier(num_ranks)
        self._given: dict[int, Any] = {}

    def exchange(self, rank: int, given: Any) -> list[Any]:
        """Of all ranks, by rank."""
        self._given[rank] = given
        self._barrier.wait(30)
        everything = [self._given[peer] for peer in range(self.num_ranks)]
        self._barrier.wait(30)
        return everything

    def shuffled(self, items: list[Any]) -> list[Any]:
        return self._rng.sample(items, len(items))


def make_module(hub: Hub) -> ModuleType:
    class ElasticBuffer:
        def __init__(
            self,
            group: Any,
            num_bytes: int | None = None,
            num_cpu_bytes: int = 0,
            num_max_tokens_per_rank: int = 0,
            hidden: int = 0,
            num_topk: int = 0,
            use_fp8_dispatch: bool = False,
            deterministic: bool = False,
            allow_hybrid_mode: bool = True,
            allow_multiple_reduction: bool = True,
            prefer_overlap_with_compute: bool = True,
            sl_idx: int = 3,
            num_allocated_qps: int = 0,
            num_cpu_timeout_secs: int = 300,
            num_gpu_timeout_secs: int = 100,
            explicitly_destroy: bool = False,
        ) -> None:
            assert not use_fp8_dispatch
            assert group._get_backend(torch.device("cuda"))._comm_ptr() == 1000 + group.rank()
            self.rank, self.num_ranks = group.rank(), group.size()
            self.max_tokens, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
            self.timeouts_s = num_cpu_timeout_secs, num_gpu_timeout_secs
            hub.exchange(self.rank, None)
            group.barrier()

        def destroy(self) -> None:
            raise AssertionError("waits for all peers")

        def dispatch(
            self,
            x: Tensor,
            topk_idx: Tensor | None = None,
            topk_weights: Tensor | None = None,
            cumulative_local_expert_recv_stats: Tensor | None = None,
            num_experts: int | None = None,
            num_max_tokens_per_rank: int | None = None,
            expert_alignment: int | None = None,
            num_sms: int = 0,
            num_qps: int = 0,
            previous_event: Any = None,
            previous_event_before_epilogue: Any = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
            handle: Any = None,
            do_handle_copy: bool = True,
            do_cpu_sync: bool | None = None,
            do_expand: bool = False,
            do_zero_padding: bool = False,
            use_tma_aligned_col_major_sf: bool = False,
        ) -> tuple[Tensor, None, None, EPHandle, None]:
            assert topk_idx is not None
            assert num_experts is not None
            assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == self.hidden
            assert topk_idx.dtype == torch.int64 and topk_idx.shape == (len(x), self.num_topk)
            assert 0 < len(x) <= num_max_tokens_per_rank == self.max_tokens
            assert num_experts % self.num_ranks == 0
            assert expert_alignment == 1 and do_expand and do_cpu_sync is False
            hub.calls[self.rank].append("dispatch")
            everything = hub.exchange(self.rank, (x.clone(), topk_idx.clone()))
            num_local = num_experts // self.num_ranks
            sources: list[tuple[int, int, int]] = []
            ends = []
            for expert in range(self.rank * num_local, (self.rank + 1) * num_local):
                found = [
                    (source, token, k)
                    for source, (_, ids) in enumerate(everything)
                    for token, k in (ids == expert).nonzero().tolist()
                ]
                sources += hub.shuffled(found)
                ends.append(len(sources))
            worst = self.num_ranks * self.max_tokens * min(self.num_topk, num_local)
            recv_x = torch.full((worst, self.hidden), GARBAGE, dtype=torch.bfloat16)
            for row, (source, token, _) in enumerate(sources):
                recv_x[row] = everything[source][0][token]
            psum = torch.tensor(ends, dtype=torch.int32)
            return recv_x, None, None, EPHandle(num_experts, topk_idx.clone(), psum, sources), None

        def combine(
            self,
            x: Tensor,
            handle: EPHandle,
            topk_weights: Tensor | None = None,
            bias: Any = None,
            num_sms: int = 0,
            num_qps: int = 0,
            previous_event: Any = None,
            previous_event_before_epilogue: Any = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
        ) -> tuple[Tensor, None, None]:
            assert x.dtype == torch.bfloat16 and x.is_contiguous() and len(x) >= len(handle.sources)
            hub.calls[self.rank].append("combine")
            sent = [(*source, x[row].clone()) for row, source in enumerate(handle.sources)]
            num_tokens = len(handle.topk_idx)
            combined = torch.zeros(num_tokens, self.hidden, dtype=torch.bfloat16)
            for given in hub.exchange(self.rank, sent):  # sums what each rank has, rank by rank
                for source, token, _, row in given:
                    if source == self.rank:
                        combined[token] += row
            return combined, None, None

    module = ModuleType("deep_ep")
    module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64  # type: ignore[attr-defined]
    return module
