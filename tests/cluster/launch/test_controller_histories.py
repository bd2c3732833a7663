"""Controller: random histories of events, deaths, faults and scaling keep its rules, and end in a ready generation."""

from __future__ import annotations

import random

import pytest
from controller_rig import Rig

from switchgear.actions import (
    Action,
    FailRank,
    GiveUp,
    KillRank,
    Scaled,
    ScaleFailed,
    SendTo,
    StartRank,
    Vacate,
)
from switchgear_runtime.errors import RequestError
from switchgear_runtime.messages import BeginGeneration, Stop, Waking


class World:
    """What the launcher and the ranks would know. `inside`: the generation a rank was last told to enter."""

    def __init__(self, seed: int) -> None:
        self.name = f"seed {seed}"
        self.draw = random.Random(seed)
        self.rig = Rig(self.draw.randint(1, 4), max_restarts=1000)
        self.alive: set[int] = set()
        self.joined: set[int] = set()
        self.dying: set[int] = set()
        self.stopping: set[int] = set()
        self.inside: dict[int, int] = {}
        self.vacant: set[int] = set()  # ranks that were told to leave
        self.num_scaled = self.num_failed = self.num_orders = 0
        self.rig.serve()
        self.alive.update(range(self.rig.num_ranks))
        self.joined.update(self.alive)
        self.inside = dict.fromkeys(self.alive, self.rig.generation)

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartRank():
                    assert action.rank not in self.alive, f"{self.name}: rank {action.rank} is started while it lives"
                    self.alive.add(action.rank)
                    self.joined.discard(action.rank)
                    self.vacant.discard(action.rank)
                    self.inside.pop(action.rank, None)
                case KillRank():
                    self.dying.add(action.rank)
                case FailRank():
                    assert action.rank not in self.vacant, f"{self.name}: it held nothing"
                case Vacate():
                    self.vacant.update(action.ranks)
                case SendTo() if isinstance(action.message, BeginGeneration):
                    descriptor = action.message.descriptor
                    members = set(range(descriptor.world_size))
                    assert members <= self.joined - self.dying - self.vacant, self.name
                    assert action.rank in members, self.name
                    assert descriptor.generation > self.inside.get(action.rank, 0), self.name
                    self.inside[action.rank] = descriptor.generation
                case SendTo() if isinstance(action.message, Stop):
                    assert action.rank in self.vacant, self.name
                    self.stopping.add(action.rank)
                case Scaled():
                    self.num_scaled += 1
                    assert self.alive == set(range(action.num_ranks)) == self.joined, self.name
                    assert self.rig.controller.num_ranks == action.num_ranks
                case ScaleFailed():
                    self.num_failed += 1
                case GiveUp():
                    pytest.fail(f"{self.name}: gave up: {action.reason}")

    def exit(self, rank: int, reason: str = "was killed by SIGKILL") -> None:
        for ranks in (self.alive, self.dying, self.joined, self.stopping):
            ranks.discard(rank)
        self.apply(self.rig.controller.on_exit(rank, reason))

    def hello(self, rank: int) -> None:
        self.joined.add(rank)
        self.apply(self.rig.hello(rank))

    def parked(self, rank: int) -> None:
        self.apply(self.rig.controller.on_parked(rank, self.inside[rank], 0))

    def scale(self) -> None:
        try:
            actions = self.rig.controller.scale(self.draw.randint(1, 6))
        except RequestError:
            return
        self.num_orders += 1
        self.apply(actions)

    def recover(self) -> None:
        """The trouble is over: the world answers promptly."""
        controller = self.rig.controller
        for _ in range(300):
            if controller.ready and self.num_scaled + self.num_failed == self.num_orders and not self.dying:
                return
            self.rig.system.time += 0.2
            self.apply(controller.tick())
            for rank in sorted(self.dying | self.stopping):
                self.exit(rank)
            for rank in sorted(self.alive - self.joined - self.dying):
                self.hello(rank)
            for rank in sorted(self.inside.keys() & self.alive):
                self.parked(rank)
        pytest.fail(f"{self.name}: stuck in {controller._phase}")


@pytest.mark.parametrize("with_scaling", [False, True], ids=["fixed", "scaling"])
@pytest.mark.parametrize("seed", range(200))
def test_random_histories_keep_the_rules(seed: int, with_scaling: bool) -> None:
    """Whatever happens in whatever order: no rank is started before it is seen gone, no generation begins without all
    of its ranks, each order to scale ends once, and when the trouble ends the cluster is ready again."""
    world = World(seed)
    draw, controller = world.draw, world.rig.controller
    events = ["exit", "lost", "fault", "hello", "hello", "frame", "frame", "tick", "break", "waking"]
    for _ in range(80):
        rank = draw.choice(controller.ranks)
        world.rig.system.time += draw.random()
        match draw.choice(events + ["scale"] * with_scaling):
            case "exit" if rank in world.alive:
                world.exit(rank)
            case "lost" if rank in world.joined:
                world.apply(controller.on_lost_link(rank, "it closed"))
            case "fault" if rank in world.joined:
                world.apply(world.rig.fault(rank, peers=(draw.choice(controller.ranks),)))
            case "break" if rank in world.joined:
                world.apply(world.rig.fault(rank, kind="MemoryError"))
            case "hello" if rank in world.alive - world.joined - world.dying:
                world.hello(rank)
            case "frame" if rank in world.inside and rank in world.alive:
                world.parked(rank)
            case "waking" if rank in world.inside:
                world.apply(controller.on_waking(Waking(rank, world.inside[rank], draw.randrange(5))))
            case "tick":
                world.apply(controller.tick())
            case "scale":
                world.scale()
    world.recover()
    assert world.num_scaled + world.num_failed == world.num_orders, world.name
    assert world.alive == world.joined == set(range(controller.num_ranks)), world.name
