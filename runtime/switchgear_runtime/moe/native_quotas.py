"""The quotas of one layer by native code: `NativeQuotas`, the owner of a handle of csrc/placement/quotas.h.

`moe/quotas.py` is its slow reference, and says what it computes. Imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime import native
from switchgear_runtime.moe.quotas import CHOICES, Balance

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class _Spec(ctypes.Structure):
    _fields_ = [
        ("num_ranks", c_int64),
        ("num_experts", c_int64),
        ("num_slots", c_int64),
        ("held_RS", c_void_p),
        ("choice", c_int64),
        ("lending", c_int64),
        ("expert_rows", c_int64),
        ("lent_expert_rows", c_int64),
        ("num_variants", c_int64),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    core = native.core()
    for name, result, arguments in (
        ("create", c_void_p, (POINTER(_Spec),)),
        ("free", None, (c_void_p,)),
        ("stride", c_int64, (c_void_p,)),
        ("can_plan", ctypes.c_int, (c_void_p, c_int32)),
        ("plan", ctypes.c_int, (c_void_p, c_void_p, c_int64, c_int32, POINTER(c_int32))),
        ("choose", ctypes.c_int, (c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
        ("parts", c_int64, (c_int64, c_void_p, c_void_p, c_void_p)),
        ("instances", c_int64, (c_int64, c_void_p)),
        ("costs", None, (POINTER(c_int64), POINTER(c_int64))),
    ):
        function = getattr(core, f"sg_quotas_{name}")
        function.restype, function.argtypes = result, arguments
    return core


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotasPlan:
    """What a plan costs, beside the static slots, and where: [I, 4] of expert, rank, slot, rows; None: as static."""

    static_cost: int
    cost: int
    instances_I4: Int64 | None


class NativeQuotas:
    """Of one layer's placement, held_RS: logical expert of each slot of each rank. `num_variants`: as Planner's."""

    def __init__(self, held_RS: Int32, num_experts: int, balance: Balance, *, num_variants: int = 0) -> None:
        held_RS = np.ascontiguousarray(held_RS, np.int32)
        self.num_ranks, self.num_slots = held_RS.shape
        self.num_experts = num_experts
        self._library = _library()
        spec = _Spec(
            num_ranks=self.num_ranks,
            num_experts=num_experts,
            num_slots=self.num_slots,
            held_RS=held_RS.ctypes.data,
            choice=CHOICES.index(balance.choice),
            lending=balance.lending,
            expert_rows=balance.expert_rows,
            lent_expert_rows=balance.lent_price,
            num_variants=num_variants,
        )
        handle = self._library.sg_quotas_create(ctypes.byref(spec))
        if not handle:
            raise ValueError(native.last_error())
        self.handle: int = handle
        self.is_hash = balance.choice == "hash"
        self.stride: int = self._library.sg_quotas_stride(handle)
        weakref.finalize(self, self._library.sg_quotas_free, handle)

    def can_plan(self, *, lends: bool) -> bool:
        """Whether a plan could differ from the static slots."""
        return bool(self._library.sg_quotas_can_plan(self.handle, lends))

    def plan(self, counts_RE: Int64, source: int, *, lends: bool = True) -> None:
        """`choose` then is for the tokens of `source`. The plan is this thread's until its next."""
        counts_RE = np.ascontiguousarray(counts_RE, np.int64)
        assert counts_RE.shape == (self.num_ranks, self.num_experts)
        if self._library.sg_quotas_plan(self.handle, counts_RE.ctypes.data, source, lends, None):
            raise RuntimeError(native.last_error())

    def choose(self, topk_ids_TK: Int32) -> Int32:
        """The slot of each (token, k) of the rank that the latest plan was for."""
        topk_ids_TK = np.ascontiguousarray(topk_ids_TK, np.int32)
        slots_TK = np.empty_like(topk_ids_TK)
        num_tokens, top_k = topk_ids_TK.shape
        if self._library.sg_quotas_choose(
            self.handle, topk_ids_TK.ctypes.data, num_tokens, top_k, slots_TK.ctypes.data
        ):
            raise RuntimeError(native.last_error())
        return slots_TK

    def parts(self) -> tuple[Int32, Int32, Int32]:
        """What `choose` does, as data: begin_E1, ends_P, slots_P of csrc/placement/quotas.h."""
        begin_E1 = np.zeros(self.num_experts + 1, np.int32)
        capacity: int = self._library.sg_quotas_parts(-1, None, None, None)
        ends_P, slots_P = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
        self._library.sg_quotas_parts(capacity, begin_E1.ctypes.data, ends_P.ctypes.data, slots_P.ctypes.data)
        return begin_E1, ends_P, slots_P

    def explain(self, counts_RE: Int64) -> QuotasPlan:
        """The plan itself, for tests and simulations."""
        counts_RE = np.ascontiguousarray(counts_RE, np.int64)
        assert counts_RE.shape == (self.num_ranks, self.num_experts)
        is_static, static_cost, cost = c_int32(), c_int64(), c_int64()
        if self._library.sg_quotas_plan(self.handle, counts_RE.ctypes.data, 0, True, ctypes.byref(is_static)):
            raise RuntimeError(native.last_error())
        self._library.sg_quotas_costs(ctypes.byref(static_cost), ctypes.byref(cost))
        instances_I4 = None
        if not is_static.value:
            instances_I4 = np.empty((self._library.sg_quotas_instances(0, None), 4), np.int64)
            self._library.sg_quotas_instances(len(instances_I4), instances_I4.ctypes.data)
        return QuotasPlan(static_cost=static_cost.value, cost=cost.value, instances_I4=instances_I4)
