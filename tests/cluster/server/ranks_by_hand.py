"""Plays the ranks by hand: a ServerCore whose messages are kept, and tokens pushed back as a rank would send them."""

from __future__ import annotations

from dataclasses import dataclass, field

from switchgear.config import bundled_model
from switchgear.server.core import ServerCore
from switchgear.server.events import SequenceEvent
from switchgear.server.limits import ModelFacts, ServerLimits
from switchgear.server.request import Observer
from switchgear.tokenizer import Tokenizer
from switchgear_runtime.messages import Abort, RankStats, StepFrame, Submit, TokenOutput, ToRank
from switchgear_runtime.system import RealSystem

STATS = RankStats(1, 0, 90, 100, 0, 0, 0, 0)
FACTS = ModelFacts(vocab_size=4096, max_model_len=2048, eos_token_ids=(0,), num_layers=2, num_experts=3)


class ManualClock(RealSystem):
    def __init__(self) -> None:
        super().__init__(seed=7)
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s


@dataclass
class Hand:
    """`submitted[sequence_id]`: (rank, Submit). `events`: all that reached sinks made by `sink`."""

    core: ServerCore
    clock: ManualClock
    sent: list[tuple[int, ToRank]] = field(default_factory=list)
    events: list[SequenceEvent] = field(default_factory=list)

    @property
    def submitted(self) -> dict[int, tuple[int, Submit]]:
        return {message.sequence_id: (rank, message) for rank, message in self.sent if isinstance(message, Submit)}

    @property
    def aborted(self) -> list[int]:
        return [message.sequence_id for _, message in self.sent if isinstance(message, Abort)]

    def frame(self, rank: int, *tokens: TokenOutput) -> None:
        self.core.on_message(rank, StepFrame(rank=rank, generation=1, step=1, tokens=list(tokens), stats=STATS))

    def play(self, sequence_id: int, token_ids: list[int], finish: str | None = None, start: int = 0) -> None:
        """The owner's next tokens, a step each."""
        rank, submit = self.submitted[sequence_id]
        for i, token_id in enumerate(token_ids):
            last = i == len(token_ids) - 1
            self.frame(
                rank,
                TokenOutput(sequence_id, submit.incarnation, start + i, token_id, finish if last else None),
            )

    def text(self, prompt_index: int = 0, index: int = 0) -> str:
        chosen = [e for e in self.events if (e.prompt_index, e.index) == (prompt_index, index)]
        return "".join(event.text for event in chosen)

    def finishes(self) -> list[SequenceEvent]:
        return [event for event in self.events if event.finish is not None]


def deal(
    num_ranks: int = 2,
    *,
    limits: ServerLimits | None = None,
    facts: ModelFacts = FACTS,
    observer: Observer | None = None,
) -> Hand:
    clock = ManualClock()
    sent: list[tuple[int, ToRank]] = []
    core = ServerCore(
        system=clock,
        tokenizer=Tokenizer.load(bundled_model()),
        facts=facts,
        limits=limits,
        send=lambda rank, message: sent.append((rank, message)),
        observer=observer,
    )
    core.set_ready(range(num_ranks), generation=1, epoch=0)
    return Hand(core, clock, sent)
