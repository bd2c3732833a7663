"""Frames between server and rank: round trips, and every broken frame is a WireError."""

from __future__ import annotations

import random

import msgpack
import pytest

from switchgear_runtime import messages as m
from switchgear_runtime.errors import StaleTerm, WireError
from switchgear_runtime.generation import Fence, GenerationDescriptor
from switchgear_runtime.header import HeaderMismatch, StepHeader, decide
from switchgear_runtime.moe.expert_map import ExpertMap

SAMPLING = m.WireSampling(
    temperature=0.5,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    logit_bias={3: 1.5},
    stop_token_ids=(0,),
    max_tokens=4,
    min_tokens=0,
    logprobs=2,
    seed=2**64 - 1,
)
SUBMIT = m.Submit(
    sequence_id=7, incarnation=2, prompt_token_ids=[1, 2], output_token_ids=[5], sampling=SAMPLING, version=3
)
STATS = m.RankStats(1, 2, 3, 4, 5, 6, 7, 8)
FRAME = m.StepFrame(
    rank=1,
    generation=3,
    step=9,
    tokens=[m.TokenOutput(7, 2, 1, 42, "stop", -0.25, [(42, -0.25), (1, -2.0)], 16)],
    stats=STATS,
    expert_load=[1, 2],
    tenant_load={"a": b"\x01\x00\x00\x00\xff\x00\x00\x00", "": b""},
)


def test_round_trips() -> None:
    descriptor = GenerationDescriptor(term=1, generation=2, world_size=4, epoch=0, channel="c")
    expert_map = ExpertMap.contiguous(2, 8, 4, epoch=5).to_json()
    to_rank = (
        SUBMIT,
        m.Submits([SUBMIT, SUBMIT]),
        m.BeginGeneration(descriptor),
        m.BeginGeneration(descriptor, expert_map, {"oldest": 0, "swaps": []}),
        m.StageMap(generation=2, expert_map=expert_map, bytes_per_s=1 << 20, source="peer"),
        m.StageMap(generation=2, expert_map=expert_map, versions={"oldest": 0, "swaps": []}),
        m.DropMap(2, 5),
        m.Abort(3),
        m.Wake(1, 2),
        m.Stop(),
    )
    for message in to_rank:
        assert m.decode_to_rank(m.encode(message)) == message
    staged = m.MapStaged(
        rank=1, generation=2, epoch=5, num_experts=3, moved_bytes=99, seconds=0.5, sources={"mapped": 2, "disk": 1}
    )
    refused = m.MapRefused(rank=1, generation=2, epoch=5, reason="rank 3 is gone")
    for message in (FRAME, staged, refused, m.Parked(0, 1, 2), m.Waking(0, 1, 2), m.Rejected(1, 1, "no")):
        assert m.decode_from_rank(m.encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb({"type": "nonsense"}),
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "abort", "sequence_id": "seven"}),
        msgpack.packb({"type": "abort", "sequence_id": msgpack.ExtType(4, b"x")}),
        msgpack.packb({"type": "abort", "sequence_id": 1}) + b"\x00",
        msgpack.packb({"type": "stage_map", "generation": 1, "expert_map": [1]}),
        msgpack.packb({"type": "stage_map", "generation": 1, "expert_map": {}, "source": "thin air"}),
        msgpack.packb({"type": "drop_map", "generation": 1}),
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\xa4\xff\xfe\xfd\xfc",
        b"\x81\x80\x01",  # a map as a key
    ],
    ids=repr,
)
def test_broken_frames_are_wire_errors(data: bytes) -> None:
    with pytest.raises(WireError):
        m.decode_to_rank(data)


def test_random_mutations_never_escape() -> None:
    draw = random.Random(11)
    whole = m.encode(SUBMIT)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            m.decode_to_rank(bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data))
        except WireError:
            continue


def header(rank: int, **changes: int | bool) -> StepHeader:
    fields: dict[str, int | bool] = {"generation": 1, "step": 5, "epoch": 2, "staged_epoch": 2} | changes
    return StepHeader(rank=rank, **fields)  # type: ignore[arg-type]


def test_header_round_trip() -> None:
    one = header(3, num_tokens=17, has_work=True, stop=True)
    assert StepHeader.unpack(one.pack()) == one
    with pytest.raises(HeaderMismatch):
        StepHeader.unpack(one.pack()[:-1])


def test_decisions() -> None:
    assert decide([header(0), header(1)]).kind == "park"
    assert decide([header(0, has_work=True), header(1)]).kind == "run"
    assert decide([header(0, stop=True, has_work=True), header(1)]).kind == "run"
    assert decide([header(0, stop=True), header(1, stop=True)]).kind == "stop"
    assert decide([header(0, staged_epoch=3, has_work=True), header(1)]).epoch == 2
    assert decide([header(0, staged_epoch=3), header(1, staged_epoch=4)]).epoch == 2
    assert decide([header(0, staged_epoch=3), header(1, staged_epoch=3)]).epoch == 3
    for wrong in (header(1, step=6), header(1, generation=2), header(1, epoch=1), header(0)):
        with pytest.raises(HeaderMismatch):
            decide([header(0), wrong])


def test_fence_refuses_the_past() -> None:
    def descriptor(term: int, generation: int) -> GenerationDescriptor:
        return GenerationDescriptor(term=term, generation=generation, world_size=1, epoch=0, channel="c")

    fence = Fence()
    fence.accept(descriptor(2, 7))
    for stale in ((1, 8), (2, 7), (2, 6)):
        with pytest.raises(StaleTerm):
            fence.accept(descriptor(*stale))
    fence.accept(descriptor(3, 8))
