"""SubmitBox: what is put in one turn of the loop leaves together, in order, in messages that fit a frame."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from switchgear import submit_box
from switchgear.submit_box import SubmitBox
from switchgear_runtime.messages import Submit, Submits, WireSampling

SAMPLING = WireSampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    logit_bias={},
    stop_token_ids=(),
    max_tokens=4,
    min_tokens=0,
    logprobs=None,
    seed=1,
)
SUBMIT = Submit(sequence_id=0, incarnation=1, prompt_token_ids=[1] * 50, output_token_ids=[], sampling=SAMPLING)


def submit(sequence_id: int) -> Submit:
    return msgspec.structs.replace(SUBMIT, sequence_id=sequence_id)


def test_a_turn_leaves_together() -> None:
    sent: list[dict[int, list[Submits]]] = []

    async def scenario() -> None:
        box = SubmitBox(sent.append)
        for sequence_id in range(6):
            box.put(sequence_id % 2, submit(sequence_id))
        assert not sent
        await asyncio.sleep(0)
        box.put(1, submit(6))
        box.flush()  # before another message to that rank
        await asyncio.sleep(0)

    asyncio.run(scenario())
    ids = [
        {rank: [one.sequence_id for part in parts for one in part.sequences] for rank, parts in by_rank.items()}
        for by_rank in sent
    ]
    assert ids == [{0: [0, 2, 4], 1: [1, 3, 5]}, {1: [6]}]


def test_messages_stay_within_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_box, "TOKENS_MAX", 400)
    sent: list[dict[int, list[Submits]]] = []

    async def scenario() -> None:
        box = SubmitBox(sent.append)
        for sequence_id in range(5):
            box.put(3, submit(sequence_id))
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert [[one.sequence_id for one in part.sequences] for part in sent[0][3]] == [[0, 1], [2, 3], [4]]
