"""Was the last plan right? `Hindsight` judges it on the window that followed, and holds still after one that was not.

A plan that is no better there than the map it replaced was chasing traffic that had moved on. After one such plan the
next windows pass without a move: 2, then 4, 8, ... so that traffic which alternates at the controller's own pace cannot
make it move experts to and fro. One plan that proves right ends that.
"""

from __future__ import annotations

from switchgear.placement.events import PlanReply
from switchgear_runtime.moe.expert_map import ExpertMap

HOLD_WINDOWS_MAX = 64


class Hindsight:
    def __init__(self) -> None:
        self.hold_windows = 0  # to let pass without a move
        self.num_regretted = 0  # since the start
        self.replaced: ExpertMap | None = None  # by a plan that the next window is to judge
        self._regrets = 0  # in a row

    def committed(self, replaced: ExpertMap | None) -> None:
        """A plan is in force. None: what the operator ordered is not judged."""
        self.replaced = replaced

    def window_closed(self) -> None:
        self.hold_windows = max(0, self.hold_windows - 1)

    def judge(self, reply: PlanReply) -> None:
        """`reply` compares both maps on the window that followed the plan."""
        if self.replaced is None or reply.previous_s is None:
            return
        self.replaced = None
        if reply.current_s < reply.previous_s:
            self._regrets = 0
            return
        self._regrets += 1
        self.num_regretted += 1
        self.hold_windows = min(HOLD_WINDOWS_MAX, 2**self._regrets)
