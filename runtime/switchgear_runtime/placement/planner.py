"""The planner's native side: EPLB, the search of all layers at once, and the even split of rows over replicas.

Letters: L MoE layers, E logical experts, R ranks, S slots per rank, P = R * S slots, K scenarios.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime import native

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
NUM_THREADS = 2
UNLIMITED = 1 << 40
SLACK_SWAPS_MAX = 8  # csrc/placement/slack.cpp


class _SearchArgs(ctypes.Structure):
    """sg_placement_search_args of csrc/placement/planner.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_layers", "num_experts", "num_ranks", "slots_per_rank")),
        *((name, ctypes.c_int64) for name in ("num_scenarios", "num_threads", "extra_max")),
        *((name, ctypes.c_int64) for name in ("steps_max", "near_steps_max", "per_move")),
        *((name, ctypes.c_double) for name in ("expert_s", "target", "near")),
        *((name, ctypes.c_void_p) for name in ("moves_max_L", "weight_K", "work_KLE", "rows_KLE")),
        *((name, ctypes.c_void_p) for name in ("held_LP", "had_LRE", "frozen_LE")),
        *((name, ctypes.c_void_p) for name in ("num_points_L", "moves_LN", "level_max_LN", "num_edits_L")),
        ("edits_max", ctypes.c_int64),
        ("edits", ctypes.c_void_p),
    ]


@functools.cache
def _core() -> ctypes.CDLL:
    library = native.core()
    count, pointer = ctypes.c_int64, ctypes.c_void_p
    library.sg_placement_search.argtypes = [ctypes.POINTER(_SearchArgs)]
    library.sg_placement_insure.argtypes = [ctypes.POINTER(_SearchArgs)]
    library.sg_placement_split.argtypes = [count] * 4 + [pointer] * 3 + [count]
    library.sg_placement_eplb.argtypes = [count] * 6 + [pointer] * 2 + [count]
    return library


def _run(status: int) -> None:
    if status:
        raise MemoryError(native.last_error())


def eplb(load_LE: Int64, num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> Int32:
    """[L, num_physical]; switchgear.placement.eplb_reference says what it is."""
    num_layers, num_experts = load_LE.shape
    assert num_physical >= num_experts
    assert num_physical % num_gpus == 0
    assert num_gpus % num_nodes == 0
    assert num_experts % num_groups == 0
    load_LE = np.ascontiguousarray(load_LE, np.int64)
    physical_LP = np.empty((num_layers, num_physical), np.int32)
    sizes = (num_layers, num_experts, num_physical, num_groups, num_nodes, num_gpus)
    _run(_core().sg_placement_eplb(*sizes, load_LE.ctypes.data, physical_LP.ctypes.data, NUM_THREADS))
    return physical_LP


def split(rows_LE: Float64, held_LP: Int32, num_ranks: int) -> Float64:
    """Rows of each slot [L, P], where replicas share so that the ranks' maximum is least."""
    num_layers, num_experts = rows_LE.shape
    rows_LE = np.ascontiguousarray(rows_LE, np.float64)
    held_LP = np.ascontiguousarray(held_LP, np.int32)
    assert held_LP.min(initial=0) >= -1
    assert held_LP.max(initial=0) < num_experts
    rows_LP = np.empty(held_LP.shape, np.float64)
    sizes = (num_layers, num_experts, num_ranks, held_LP.shape[1] // num_ranks)
    pointers = (rows_LE.ctypes.data, held_LP.ctypes.data, rows_LP.ctypes.data)
    _run(_core().sg_placement_split(*sizes, *pointers, NUM_THREADS))
    return rows_LP


@dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """What a search of all layers found; N points at most, of which layer l has num_points_L[l]."""

    num_points_L: Int32
    moves_LN: Int32  # experts that a rank does not have today
    level_max_LN: Float64  # the slowest rank, expected over scenarios
    num_edits_L: Int32
    edits_L: Int32  # [L, edits, 4]: step, slot, expert, whether it comes (else it leaves)
    start_LP: Int32

    def held(self, layer: int, point: int) -> Int32:
        """The layer's slots at a point of its path."""
        held_P: Int32 = self.start_LP[layer].copy()
        for step, slot, expert, comes in self.edits_L[layer, : self.num_edits_L[layer]].tolist():
            if step > point:
                break
            held_P[slot] = expert if comes else -1
        return held_P


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """All layers' arguments; switchgear.placement.layer_reference says what they mean."""

    weight_K: Float64
    work_KLE: Float64
    rows_KLE: Float64
    expert_s: float
    held_LP: Int32
    had_LRE: Bool
    frozen_LE: Bool
    extra_max: int = UNLIMITED
    moves_max_L: Int64 | None = None
    steps_max: int
    near_steps_max: int = UNLIMITED
    target: float = 1.0
    near: float = 1.0
    per_move: bool = False

    def paths(self) -> Paths:
        """A local search in each layer."""
        return self._run(_core().sg_placement_search, 4 * self.steps_max)

    def insured(self) -> Paths:
        """Three points: the start; with free slots filled, once at most `steps_max` (> 1) stale replicas are gone; and with
        replicas swapped where ranks have little slack."""
        assert self.steps_max > 1
        return self._run(_core().sg_placement_insure, self.steps_max + self.held_LP.shape[1] + 2 * SLACK_SWAPS_MAX)

    def _run(self, call: Callable[..., int], edits_max: int) -> Paths:
        num_layers, num_ranks, num_experts = self.had_LRE.shape
        weight_K, work_KLE, rows_KLE = (
            np.ascontiguousarray(values, np.float64) for values in (self.weight_K, self.work_KLE, self.rows_KLE)
        )
        held_LP = np.ascontiguousarray(self.held_LP, np.int32)
        had, frozen = (np.ascontiguousarray(values, np.uint8) for values in (self.had_LRE, self.frozen_LE))
        moves_max_L = np.full(num_layers, UNLIMITED) if self.moves_max_L is None else self.moves_max_L
        moves_max_L = np.ascontiguousarray(moves_max_L, np.int64)
        assert work_KLE.shape == rows_KLE.shape == (len(weight_K), num_layers, num_experts)
        assert frozen.shape == (num_layers, num_experts)
        assert moves_max_L.shape == (num_layers,)
        assert held_LP.shape[0] == num_layers
        assert held_LP.shape[1] % num_ranks == 0
        assert held_LP.min(initial=0) >= -1
        assert held_LP.max(initial=0) < num_experts
        paths = Paths(
            num_points_L=np.zeros(num_layers, np.int32),
            moves_LN=np.zeros((num_layers, self.steps_max + 1), np.int32),
            level_max_LN=np.zeros((num_layers, self.steps_max + 1), np.float64),
            num_edits_L=np.zeros(num_layers, np.int32),
            edits_L=np.zeros((num_layers, edits_max, 4), np.int32),
            start_LP=held_LP,
        )
        arguments = _SearchArgs(
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=num_ranks,
            slots_per_rank=held_LP.shape[1] // num_ranks,
            num_scenarios=len(weight_K),
            num_threads=NUM_THREADS,
            extra_max=self.extra_max,
            steps_max=self.steps_max,
            near_steps_max=self.near_steps_max,
            per_move=self.per_move,
            expert_s=self.expert_s,
            target=self.target,
            near=self.near,
            moves_max_L=moves_max_L.ctypes.data,
            weight_K=weight_K.ctypes.data,
            work_KLE=work_KLE.ctypes.data,
            rows_KLE=rows_KLE.ctypes.data,
            held_LP=held_LP.ctypes.data,
            had_LRE=had.ctypes.data,
            frozen_LE=frozen.ctypes.data,
            num_points_L=paths.num_points_L.ctypes.data,
            moves_LN=paths.moves_LN.ctypes.data,
            level_max_LN=paths.level_max_LN.ctypes.data,
            num_edits_L=paths.num_edits_L.ctypes.data,
            edits_max=edits_max,
            edits=paths.edits_L.ctypes.data,
        )
        _run(call(ctypes.byref(arguments)))
        return paths
