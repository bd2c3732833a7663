"""From one number of ranks to another: `Scaling`, the part of the controller that newcomers and leavers go through."""

from __future__ import annotations

from switchgear.actions import Action, Forget, KillRank, NotReady, Scaled, ScaleFailed, SendTo, Vacate
from switchgear.roster import LEAVE_TIMEOUT_S, Roster
from switchgear_runtime.errors import RequestError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import EndGeneration, Stop
from switchgear_runtime.system import System


class Scaling:
    """One change at a time: `begin`, then `resize` whenever the members may change, until `settle` says Scaled."""

    def __init__(self, roster: Roster, system: System) -> None:
        self._roster = roster
        self._system = system
        self._target: int | None = None

    @property
    def num_ranks(self) -> int:
        """How many there are to be."""
        return len(self._roster.members) if self._target is None else self._target

    def begin(self, num_ranks: int) -> range:
        """The newcomers that are to be started. RequestError while an earlier change is not over."""
        num_members = len(self._roster.members)
        if self._target is not None or num_members != len(self._roster.lives()):
            raise RequestError(f"the cluster is being scaled to {self.num_ranks} ranks; retry later", status=409)
        self._target = num_ranks
        return range(num_members, num_ranks)

    def resize(self, descriptor: GenerationDescriptor | None) -> list[Action]:
        """Admit newcomers once all have joined; let members beyond the target leave. Empty: the members are as they
        were. `descriptor`: of the generation that the leavers may still be in."""
        newcomers = self._roster.of("newcomer")
        if not all(rank.status == "joined" for _, rank in newcomers):
            newcomers = []
        for _, rank in newcomers:
            rank.role = "member"
        leavers = [rank_id for rank_id, _ in self._roster.of("member") if rank_id >= self.num_ranks]
        if not newcomers and not leavers:
            return []
        actions: list[Action] = [NotReady(f"from now on there are {self.num_ranks} ranks", planned=True)]
        if leavers:
            actions.append(Vacate(tuple(leavers)))
        return actions + [action for rank_id in leavers for action in self._retire(rank_id, descriptor)]

    def abandon(self, reason: str) -> list[Action]:
        """A newcomer failed: none of them joins, and the members go on as before."""
        actions: list[Action] = []
        for rank_id, rank in self._roster.of("newcomer"):
            rank.role = "leaver"
            if rank.status == "gone":
                del self._roster[rank_id]
                actions.append(Forget(rank_id))
            elif rank.status != "dying":
                rank.status, rank.deadline_s = "dying", None
                actions.append(KillRank(rank_id))
        return actions + self.fail(reason)

    def fail(self, reason: str) -> list[Action]:
        target, self._target = self._target, None
        return [ScaleFailed(reason)] if target is not None else []

    def settle(self) -> list[Action]:
        """In a ready generation: is the change over?"""
        target = self._target
        if target is None or not len(self._roster.members) == len(self._roster.lives()) == target:
            return []
        self._target = None
        return [Scaled(target)]

    def _retire(self, rank_id: int, descriptor: GenerationDescriptor | None) -> list[Action]:
        rank = self._roster[rank_id]
        rank.role = "leaver"
        actions: list[Action] = []
        if rank.status == "joined":
            if descriptor is not None:
                reason = f"rank {rank_id} leaves, there are to be {self.num_ranks} ranks"
                actions.append(SendTo(rank_id, EndGeneration(descriptor.term, descriptor.generation, reason)))
            actions.append(SendTo(rank_id, Stop()))
            rank.deadline_s = self._system.now() + LEAVE_TIMEOUT_S
        elif rank.status == "starting":
            rank.status, rank.deadline_s = "dying", None
            actions.append(KillRank(rank_id))
        elif rank.status == "gone":
            del self._roster[rank_id]
            actions.append(Forget(rank_id))
        return actions
