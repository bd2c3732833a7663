"""Step headers: what is packed comes back, and all ranks derive one decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from switchgear_runtime.header import HEADER_BYTES, HeaderMismatch, StepHeader, decide


def headers(*changes: dict[str, object]) -> list[StepHeader]:
    base = StepHeader(rank=0, generation=3, step=8, epoch=2, staged_epoch=2, map_digest=7)
    return [replace(base, rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


def test_pack_and_unpack() -> None:
    header = StepHeader(
        rank=5,
        generation=1,
        step=1 << 40,
        epoch=2,
        staged_epoch=3,
        num_tokens=512,
        has_work=True,
        map_digest=0xFFFFFFFF,
    )
    for changed in (header, replace(header, stop=True), replace(header, has_work=False, fault=True)):
        assert len(changed.pack()) == HEADER_BYTES
        assert StepHeader.unpack(changed.pack()) == changed
    for data in (b"", header.pack() + b"x", b"?" + header.pack()[1:]):
        with pytest.raises(HeaderMismatch):
            StepHeader.unpack(data)


@pytest.mark.parametrize(
    ("changes", "kind", "epoch"),
    [
        ([{}, {}], "park", 2),
        ([{}, {"has_work": True}], "run", 2),
        ([{"stop": True}, {"stop": True, "has_work": True}], "stop", 2),
        ([{"stop": True}, {"has_work": True}], "run", 2),
        ([{"stop": True}, {}], "park", 2),
        ([{"staged_epoch": 4}, {"staged_epoch": 4}], "park", 4),
        ([{"staged_epoch": 4, "has_work": True}, {}], "run", 2),
        ([{"staged_epoch": 4}, {"staged_epoch": 3}], "park", 2),  # rank 0 may have no 3
        ([{"staged_epoch": 4}], "park", 4),
    ],
)
def test_decisions(changes: list[dict[str, object]], kind: str, epoch: int) -> None:
    decision = decide(headers(*changes))
    assert (decision.kind, decision.epoch) == (kind, epoch)


@pytest.mark.parametrize("change", [{"generation": 4}, {"step": 9}, {"epoch": 1}, {"map_digest": 8}, {"rank": 0}])
def test_ranks_that_disagree_find_out(change: dict[str, object]) -> None:
    good, bad = headers({}, {})
    with pytest.raises(HeaderMismatch):
        decide([good, replace(bad, **change)])  # type: ignore[arg-type]
