"""What `GET /admin/placement` says, and what the clients of it read: `PlacementStatus` and `OrderReply`.

Plain values only: the server fills them from the controller, `switchgear placement` and `switchgear top` show them.
"""

from __future__ import annotations

from typing import Any

import msgspec


class WindowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The last whole window of load. `hottest`: (layer, expert, tokens)."""

    seconds: float
    tokens: int  # routed, over all layers
    rows_by_rank: list[int]  # over all layers
    imbalance_by_layer: list[float]  # max over mean of the ranks' rows
    hottest: list[tuple[int, int, int]]


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One under way."""

    epoch: int
    model_version: int
    experts: int
    bytes: int
    seconds: float  # since it began
    waits_for_ranks: list[int]


class SwapStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An expert that was loaded from a file. `settled`: no running sequence needs the weights it had before."""

    version: int
    layer: int
    expert: int
    path: str
    sha256: str
    settled: bool


class PlacementStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`expert_map`: ExpertMap.to_json of the map in force. `alarm`: why nobody watches the placement, if so.
    `model_version`: of new sequences; the ranks know those from `oldest_version` on."""

    policy: str
    state: str
    epoch: int
    alarm: str | None
    last_reason: str
    window_s: float
    byte_budget: int | None  # bytes that may move now; None: any number
    hold_windows: int
    pinned: list[tuple[int, int, list[int]]]
    plans: int
    plan_s: float
    plan_age_s: float | None  # since the last committed one
    steps_since_commit: int
    stalled_s: float
    migrations: dict[str, int]
    migrated_experts: int
    migrated_bytes: int
    planner_restarts: int
    regretted_plans: int
    migration: MigrationStatus | None
    window: WindowStatus | None
    expert_map: dict[str, Any] | None
    model_version: int = 0
    oldest_version: int = 0
    swaps: list[SwapStatus] = []


class OrderReply(msgspec.Struct, frozen=True, kw_only=True):
    """How an order ended. Of a plan that was only looked at, `expert_map` is what it proposes."""

    epoch: int
    done: bool
    model_version: int = 0  # of new sequences
    reason: str = ""
    moves: list[tuple[int, int, int, int | None]] = []  # layer, expert, rank, source rank
    moved_bytes: int = 0
    predicted_before_s: float | None = None
    predicted_after_s: float | None = None
    expert_map: dict[str, Any] | None = None
