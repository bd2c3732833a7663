"""A Controller by hand: its events, its actions, and a clock that the test moves."""

from __future__ import annotations

from switchgear.actions import Action, Ready, SendTo
from switchgear.controller import Controller
from switchgear.store import MemoryStore, Store
from switchgear_runtime.messages import BeginGeneration, Fault, Hello
from switchgear_runtime.system import RealSystem


class HandSystem(RealSystem):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.time = 100.0

    def now(self) -> float:
        return self.time


class Rig:
    """A controller, its clock, and what it did."""

    def __init__(self, num_ranks: int = 3, *, store: Store | None = None, max_restarts: int = 3) -> None:
        self.system = HandSystem()
        self.controller = Controller(
            num_ranks=num_ranks,
            owner="test",
            store=store or MemoryStore(),
            system=self.system,
            start_timeout_s=10,
            max_restarts=max_restarts,
            restart_window_s=60,
        )
        self.num_ranks = num_ranks

    def hello(self, rank: int, fingerprint: str = "same", *, host: str = "", domain: str = "") -> list[Action]:
        return self.controller.on_hello(
            Hello(
                rank=rank,
                pid=1000 + rank,
                fingerprint=fingerprint,
                num_kv_blocks=8,
                block_size=16,
                max_model_len=128,
                num_layers=1,
                num_experts=4,
                host=host,
                domain=domain,
            )
        )

    def fault(self, rank: int, kind: str = "TransportTimeout", peers: tuple[int, ...] = ()) -> list[Action]:
        generation = self.generation
        return self.controller.on_fault(
            Fault(rank=rank, generation=generation, step=5, kind=kind, peers=list(peers), message=f"{kind} of {peers}")
        )

    @property
    def generation(self) -> int:
        return self.controller._generation

    def form(self) -> list[Action]:
        """All ranks say Hello; returns the actions of the last."""
        actions: list[Action] = []
        for rank in range(self.num_ranks):
            actions = self.hello(rank)
        return actions

    def serve(self) -> None:
        self.controller.start()
        self.form()
        for rank in range(self.num_ranks):
            actions = self.controller.on_parked(rank, self.generation, 0)
        assert [type(action) for action in actions] == [Ready]

    def wait(self, duration_s: float) -> list[Action]:
        self.system.time += duration_s
        return self.controller.tick()


def of(kind: type, actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def begun(actions: list[Action]) -> list[int]:
    return [a.rank for a in actions if isinstance(a, SendTo) and isinstance(a.message, BeginGeneration)]
