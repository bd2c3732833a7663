"""What the placement controller has done since the start: `Counters`, for metrics and `switchgear placement show`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    plans: int = 0
    migrations: dict[str, int] = field(default_factory=lambda: {"committed": 0, "refused": 0, "dropped": 0})
    migrated_experts: int = 0
    migrated_bytes: int = 0
    planner_restarts: int = 0
    steps: int = 0
    steps_at_commit: int = 0
    committed_at_s: float | None = None
    plan_s: float = 0.0  # of the latest plan

    @property
    def steps_since_commit(self) -> int:
        return self.steps - self.steps_at_commit

    def committed(self, num_experts: int, num_bytes: int, now_s: float) -> None:
        self.migrations["committed"] += 1
        self.migrated_experts += num_experts
        self.migrated_bytes += num_bytes
        self.committed_at_s, self.steps_at_commit = now_s, self.steps
