"""How the server and its planner process talk: one length-prefixed msgpack frame a message, never pickle.

A request is a `PlanRequest`, an answer a `PlanReply` (events.py); maps and windows travel as raw little-endian arrays.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from switchgear.placement.cost_model import CostModel
from switchgear.placement.events import PlanReply, PlanRequest
from switchgear.placement.plan import Move, PlacementPlan
from switchgear.placement.problem import PlacementProblem
from switchgear.placement.topology import Topology
from switchgear_runtime.errors import WireError
from switchgear_runtime.moe.expert_map import ExpertMap

PREFIX = struct.Struct("<I")
FRAME_BYTES_MAX = 256 << 20
T = TypeVar("T")


class _Map(msgspec.Struct, array_like=True, frozen=True):
    epoch: int
    num_ranks: int
    num_experts: int
    shape: tuple[int, int]
    physical_to_logical: bytes  # int32

    @classmethod
    def of(cls, expert_map: ExpertMap) -> _Map:
        physical = expert_map.physical_to_logical_LP
        shape = (int(physical.shape[0]), int(physical.shape[1]))
        return cls(
            expert_map.epoch, expert_map.num_ranks, expert_map.num_experts, shape, physical.astype("<i4").tobytes()
        )

    def map(self) -> ExpertMap:
        physical = _array(self.physical_to_logical, "<i4", self.shape).astype(np.int32)
        physical.flags.writeable = False
        expert_map = ExpertMap(
            epoch=self.epoch,
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            physical_to_logical_LP=physical,
        )
        expert_map.validate()
        return expert_map


class _Problem(msgspec.Struct, frozen=True, kw_only=True):
    hosts: tuple[str, ...]
    slots_per_rank: int
    cost: dict[str, float]
    pool_slots: int | None
    byte_budget: int | None
    replica_budget_per_layer: int | None
    pinned: list[tuple[int, int, tuple[int, ...]]]
    num_steps: int
    horizon_steps: int | None

    @classmethod
    def of(cls, problem: PlacementProblem) -> _Problem:
        return cls(
            hosts=problem.topology.hosts,
            slots_per_rank=problem.slots_per_rank,
            cost={name: getattr(problem.cost, name) for name in CostModel.__slots__},
            pool_slots=problem.pool_slots,
            byte_budget=problem.byte_budget,
            replica_budget_per_layer=problem.replica_budget_per_layer,
            pinned=[(layer, expert, tuple(ranks)) for (layer, expert), ranks in problem.pinned.items()],
            num_steps=problem.num_steps,
            horizon_steps=problem.horizon_steps,
        )

    def problem(self) -> PlacementProblem:
        cost = dict(self.cost)
        return PlacementProblem(
            topology=Topology(num_ranks=len(self.hosts), hosts=self.hosts),
            slots_per_rank=self.slots_per_rank,
            cost=CostModel(expert_bytes=int(cost.pop("expert_bytes")), **cost),
            pool_slots=self.pool_slots,
            byte_budget=self.byte_budget,
            replica_budget_per_layer=self.replica_budget_per_layer,
            pinned={(layer, expert): ranks for layer, expert, ranks in self.pinned},
            num_steps=self.num_steps,
            horizon_steps=self.horizon_steps,
        )


class _Request(msgspec.Struct, tag="plan", frozen=True, kw_only=True):
    request_id: int
    policy: str
    shape: tuple[int, int, int]
    windows: bytes  # int64
    current: _Map
    previous: _Map | None
    problem: _Problem


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    expert_map: _Map
    moves: list[Move]
    moved_bytes: int
    predicted_before_s: float
    predicted_after_s: float
    reason: str


class _Reply(msgspec.Struct, tag="planned", frozen=True, kw_only=True):
    request_id: int
    plan: _Plan | None
    current_s: float
    previous_s: float | None
    plan_s: float
    error: str


def encode_request(request: PlanRequest) -> bytes:
    windows_WLE = np.ascontiguousarray(request.windows_WLE, "<i8")
    num_windows, num_layers, num_experts = windows_WLE.shape
    return _frame(
        _Request(
            request_id=request.request_id,
            policy=request.policy,
            shape=(num_windows, num_layers, num_experts),
            windows=windows_WLE.tobytes(),
            current=_Map.of(request.current),
            previous=None if request.previous is None else _Map.of(request.previous),
            problem=_Problem.of(request.problem),
        )
    )


def decode_request(data: bytes) -> PlanRequest:
    wire = _decode(data, _Request)
    return PlanRequest(
        request_id=wire.request_id,
        policy=wire.policy,
        windows_WLE=_array(wire.windows, "<i8", wire.shape).astype(np.int64),
        current=wire.current.map(),
        problem=wire.problem.problem(),
        previous=None if wire.previous is None else wire.previous.map(),
    )


def encode_reply(reply: PlanReply) -> bytes:
    plan = reply.plan
    return _frame(
        _Reply(
            request_id=reply.request_id,
            plan=None
            if plan is None
            else _Plan(
                expert_map=_Map.of(plan.expert_map),
                moves=list(plan.moves),
                moved_bytes=plan.moved_bytes,
                predicted_before_s=plan.predicted_before_s,
                predicted_after_s=plan.predicted_after_s,
                reason=plan.reason,
            ),
            current_s=reply.current_s,
            previous_s=reply.previous_s,
            plan_s=reply.plan_s,
            error=reply.error,
        )
    )


def decode_reply(data: bytes) -> PlanReply:
    wire = _decode(data, _Reply)
    plan = None
    if wire.plan is not None:
        plan = PlacementPlan(
            expert_map=wire.plan.expert_map.map(),
            moves=tuple(wire.plan.moves),
            moved_bytes=wire.plan.moved_bytes,
            predicted_before_s=wire.plan.predicted_before_s,
            predicted_after_s=wire.plan.predicted_after_s,
            reason=wire.plan.reason,
        )
    return PlanReply(
        request_id=wire.request_id,
        plan=plan,
        current_s=wire.current_s,
        previous_s=wire.previous_s,
        plan_s=wire.plan_s,
        error=wire.error,
    )


def frame_length(prefix: bytes) -> int:
    length: int = PREFIX.unpack(prefix)[0]
    if length > FRAME_BYTES_MAX:
        raise WireError(f"a planner frame of {length} bytes is over the limit of {FRAME_BYTES_MAX}")
    return length


def _frame(message: _Request | _Reply) -> bytes:
    body = msgspec.msgpack.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise WireError(f"a planner frame of {len(body)} bytes is over the limit of {FRAME_BYTES_MAX}")
    return PREFIX.pack(len(body)) + body


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise WireError(f"a planner frame breaks the schema: {error}") from None


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if len(data) != np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise WireError(f"a planner frame has {len(data)} bytes for an array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)
