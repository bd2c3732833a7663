"""What the server and its Ray driver process say to each other: one line of JSON a message."""

from __future__ import annotations

from typing import Any

import msgspec

LINE_BYTES_MAX = 64 << 20  # a plan's request has the load windows of all experts


class DriverSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `address`: the Ray cluster to join; None: start one with its files in `folder`."""

    name: str  # of the switchgear cluster, for the actors' names
    num_ranks: int
    cpus_per_rank: float
    one_host: bool  # the ranks share memory, so they must be on one node
    address: str | None
    folder: str | None
    timeout_s: float
    gpus_per_rank: float = 0.0
    ranks_per_domain: int = 0  # that Ray must keep together; 0: as they fit
    domain_label: str = ""  # of nodes: those with one value of it are a GPU domain

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for a rank."""
        return {"CPU": self.cpus_per_rank} | ({"GPU": self.gpus_per_rank} if self.gpus_per_rank else {})


class StartActor(msgspec.Struct, tag="start", frozen=True):
    id: int
    rank: int
    config: dict[str, Any]


class KillActor(msgspec.Struct, tag="kill", frozen=True):
    id: int
    rank: int


class SweepChannel(msgspec.Struct, tag="sweep", frozen=True):
    id: int
    channel: str


class ReleasePlace(msgspec.Struct, tag="release", frozen=True):
    """The rank will not come back: its bundle, if it came later than the first ones, is free for others."""

    id: int
    rank: int


class ReadLog(msgspec.Struct, tag="log", frozen=True):
    id: int
    rank: int


class Plan(msgspec.Struct, tag="plan", frozen=True):
    """For the planner's actor, which is started if it does not run; `body` as in planner_protocol.py."""

    id: int
    body: bytes


class EndPlanner(msgspec.Struct, tag="end_planner", frozen=True):
    id: int


Command = StartActor | KillActor | SweepChannel | ReleasePlace | ReadLog | Plan | EndPlanner


class Opened(msgspec.Struct, tag="opened", frozen=True):
    """Ray is up and the bundles are placed. `host`: this host's address as the ranks see it."""

    host: str
    address: str


class OpenFailed(msgspec.Struct, tag="open_failed", frozen=True):
    error: str


class Done(msgspec.Struct, tag="done", frozen=True):
    id: int
    result: str = ""
    data: bytes = b""  # of a Plan
    error: str | None = None


class Exited(msgspec.Struct, tag="exited", frozen=True):
    """A rank's process is seen gone."""

    rank: int
    reason: str


Event = Opened | OpenFailed | Done | Exited
