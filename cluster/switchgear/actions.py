"""What the controller wants done: each `Action` is one thing for the cluster (or the simulation) to do, in order."""

from __future__ import annotations

from dataclasses import dataclass

from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import ToRank


@dataclass(frozen=True, slots=True)
class StartRank:
    rank: int


@dataclass(frozen=True, slots=True)
class KillRank:
    """Kill it; report `on_exit` once it is seen gone, or `on_unkillable`."""

    rank: int


@dataclass(frozen=True, slots=True)
class SendTo:
    rank: int
    message: ToRank


@dataclass(frozen=True, slots=True)
class Sweep:
    """Remove what a generation's transport may have left behind; nobody of it is alive in there any more."""

    channel: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The generation has run its first step on every rank: take requests."""

    descriptor: GenerationDescriptor


@dataclass(frozen=True, slots=True)
class NotReady:
    """`planned`: the next generation follows at once, and requests are still taken; else not before `Ready`."""

    reason: str
    planned: bool = False


@dataclass(frozen=True, slots=True)
class FailRank:
    """The rank is dead: what it held goes on with other ranks, from prompt and emitted tokens, once the next generation
    is ready."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Vacate:
    """These ranks are about to leave: they get nothing more, and what they hold goes on with the others."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """The rank is seen gone and will not come back: nobody need keep a place for it."""

    rank: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """A generation of so many ranks is ready, and who had to leave is gone."""

    num_ranks: int


@dataclass(frozen=True, slots=True)
class ScaleFailed:
    """The number of ranks stays, or has become, another than the one asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The cluster cannot serve, and will not by itself: every request ends with this error, every rank is ended."""

    reason: str


Action = (
    StartRank
    | KillRank
    | SendTo
    | Sweep
    | Ready
    | NotReady
    | FailRank
    | Vacate
    | Forget
    | Scaled
    | ScaleFailed
    | GiveUp
)
