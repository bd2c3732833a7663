"""An nccl.ep and nccl.core of one process, for ranks that are threads: what NcclEp calls, as nccl-extensions 0.1.0 has it.

As the real one: rows arrive in no order within an expert, what nobody wrote is garbage, a group is for one number of
experts, and its end is collective. Its combine is the real low-latency one's: in order k, with weights, rounded to bf16.
"""

# ruff: noqa: ARG002, ARG003 - the real signatures, used or not
from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from fake_deep_ep import Hub
from packaging.version import Version

BFLOAT16, FLOAT32, INT32, INT64 = 9, 7, 2, 4
_DTYPES = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32, INT32: torch.int32, INT64: torch.int64}


class Algorithm(IntEnum):
    LOW_LATENCY = 0
    HIGH_THROUGHPUT = 1


class Layout(IntEnum):
    UNSET = 0
    EXPERT_MAJOR = 1
    RANK_MAJOR = 2
    FLAT = 3


@dataclass(kw_only=True)
class GroupConfig:
    algorithm: Algorithm = Algorithm.LOW_LATENCY
    num_experts: int = 0
    max_dispatch_tokens_per_rank: int = 0
    max_recv_tokens_per_rank: int = 0
    max_token_bytes: int = 0
    rdma_buffer_size: int = 0
    num_qp_per_rank: int = 0
    num_channels: int = 0
    max_num_sms: int = 0
    alloc: Any = field(default=None)
    enable_mask: bool = False
    timeout_ns: int = 0
    zero_copy: int = 0
    overflow_policy: int = 0
    num_topk: int = 0


class Tensor:
    def __init__(self, buffer: int, *, dtype: int | None = None, shape: tuple[int, ...] | None = None) -> None:
        assert dtype is not None
        assert shape is not None
        self.shape, self.dtype = shape, _DTYPES[dtype]
        self._address = buffer

    @property
    def memory(self) -> torch.Tensor:
        """What lies at the address now."""
        num_bytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        content = (ctypes.c_uint8 * num_bytes).from_address(self._address)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)


@dataclass(kw_only=True)
class DispatchInputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(kw_only=True)
class DispatchOutputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None
    topk_idx: Tensor | None = None


@dataclass(kw_only=True)
class LayoutInfo:
    expert_counters: Tensor | None = None
    src_rank_counters: Tensor | None = None
    expert_offsets: Tensor | None = None
    recv_total_counter: Tensor | None = None
    recv_topk_idx_kind: int = 0


@dataclass(kw_only=True)
class CombineInputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(kw_only=True)
class CombineOutputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None


class Handle:
    def __init__(self, hub: Hub, rank: int, config: GroupConfig, topk_idx: Tensor) -> None:
        self._hub, self._rank, self._config = hub, rank, config
        self._top_k = topk_idx.shape[1]
        self._topk_ids = topk_idx.memory.clone()
        self._sources: list[list[tuple[int, int]]] = []
        self.is_open = True

    def update(self, topk_idx: Tensor, *, layout_info: None = None, stream: int) -> None:
        assert self.is_open
        assert topk_idx.shape[1] == self._top_k
        self._topk_ids = topk_idx.memory.clone()

    def dispatch(
        self,
        inputs: DispatchInputs,
        outputs: DispatchOutputs,
        *,
        layout_info: LayoutInfo | None = None,
        config: None = None,
        stream: int,
    ) -> None:
        hub, rank, num_ranks = self._hub, self._rank, self._hub.num_ranks
        assert self.is_open and stream == 7
        assert inputs.tokens is not None and outputs.tokens is not None and layout_info is not None
        assert layout_info.expert_counters is not None
        assert inputs.topk_weights is None and outputs.topk_weights is None and outputs.topk_idx is None
        x, num_local = inputs.tokens.memory, self._config.num_experts // num_ranks
        max_tokens = self._config.max_dispatch_tokens_per_rank
        assert 0 < len(x) == len(self._topk_ids) <= max_tokens
        assert x.dtype == torch.bfloat16 and x.shape[1] * 2 <= self._config.max_token_bytes
        assert outputs.tokens.shape == (num_local, num_ranks * max_tokens, x.shape[1])
        assert layout_info.expert_counters.shape == (num_local,)
        hub.calls[rank].append("dispatch")
        everything = hub.exchange(rank, (x.clone(), self._topk_ids))
        out = outputs.tokens.memory
        out.fill_(1e30)
        self._sources = []
        for local in range(num_local):
            found = [
                (source, token)
                for source, (_, ids) in enumerate(everything)
                for token in (ids == rank * num_local + local).any(1).nonzero().flatten().tolist()
            ]
            self._sources.append(hub.shuffled(found))
            for row, (source, token) in enumerate(self._sources[-1]):
                out[local, row] = everything[source][0][token]
        layout_info.expert_counters.memory.copy_(torch.tensor([len(found) for found in self._sources]))

    def combine(self, inputs: CombineInputs, outputs: CombineOutputs, *, config: None = None, stream: int) -> None:
        assert self.is_open and stream == 7
        assert inputs.tokens is not None and outputs.tokens is not None and outputs.topk_weights is not None
        assert outputs.topk_weights.shape == tuple(self._topk_ids.shape)
        self._hub.calls[self._rank].append("combine")
        results = inputs.tokens.memory
        num_local = self._config.num_experts // self._hub.num_ranks
        sent = {
            (source, token, self._rank * num_local + local): results[local, row].clone()
            for local, found in enumerate(self._sources)
            for row, (source, token) in enumerate(found)
        }
        returned: dict[tuple[int, int, int], torch.Tensor] = {}
        for given in self._hub.exchange(self._rank, sent):
            returned |= given
        weights, out = outputs.topk_weights.memory, outputs.tokens.memory
        for token, ids in enumerate(self._topk_ids.tolist()):
            sum_D = torch.zeros(out.shape[1])
            for k, expert in enumerate(ids):
                if expert >= 0:
                    sum_D += weights[token, k] * returned[self._rank, token, expert].float()
            out[token] = sum_D.bfloat16()

    def destroy(self) -> None:
        self.is_open = False


def make_modules(hub: Hub, version: str = "0.2.0") -> dict[str, ModuleType]:
    """By name."""

    class Communicator:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        @classmethod
        def init(cls, nranks: int, rank: int, unique_id: Any, config: None = None) -> Communicator:
            assert nranks == hub.num_ranks
            assert unique_id.as_bytes == b"unique" * 20
            hub.exchange(rank, None)
            return cls(rank)

    class UniqueId:
        def __init__(self, content: bytes) -> None:
            self.as_bytes = content

        @staticmethod
        def from_bytes(b: bytes) -> UniqueId:
            return UniqueId(b)

    class Group:
        def __init__(self, rank: int, config: GroupConfig) -> None:
            self._rank, self._config = rank, config
            self.handles: list[Handle] = []

        @classmethod
        def create(cls, comm: Communicator, config: GroupConfig) -> Group:
            assert config.algorithm == Algorithm.LOW_LATENCY and not config.enable_mask
            assert config.num_experts % hub.num_ranks == 0
            assert config.max_dispatch_tokens_per_rank * (config.num_experts // hub.num_ranks) % 4 == 0
            hub.calls[comm.rank].append(f"group {config.num_experts}")
            hub.exchange(comm.rank, None)
            return cls(comm.rank, config)

        def create_handle(
            self,
            layout: Layout,
            topk_idx: Tensor,
            *,
            layout_info: LayoutInfo | None = None,
            config: None = None,
            stream: int,
        ) -> Handle:
            assert layout == Layout.EXPERT_MAJOR and layout_info is None
            self.handles.append(Handle(hub, self._rank, self._config, topk_idx))
            return self.handles[-1]

        def destroy(self) -> None:
            assert not any(handle.is_open for handle in self.handles)
            hub.calls[self._rank].append("end of group")
            hub.exchange(self._rank, None)

    ep, core, nccl = ModuleType("nccl.ep"), ModuleType("nccl.core"), ModuleType("nccl")
    public = (Algorithm, Layout, GroupConfig, Group, Handle, Tensor, DispatchInputs, DispatchOutputs, LayoutInfo)
    for thing in (*public, CombineInputs, CombineOutputs):
        setattr(ep, thing.__name__, thing)
    vars(ep)["get_lib_version"] = lambda: Version(version)
    vars(core).update(vars(SimpleNamespace(BFLOAT16=BFLOAT16, FLOAT32=FLOAT32, INT32=INT32, INT64=INT64)))
    vars(core).update({"Communicator": Communicator, "UniqueId": UniqueId})
    vars(core)["get_unique_id"] = lambda empty=False: UniqueId(b"unique" * 20)  # noqa: ARG005
    return {"nccl": nccl, "nccl.ep": ep, "nccl.core": core}
