"""Where the weights of a version come from while it is staged: a rank that has them in a slot, or the file."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from switchgear_runtime.errors import ConfigError, TransportError
from switchgear_runtime.migration.stager import Stager
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions
from switchgear_runtime.system import RealSystem

SETTLED = ModelVersions().with_swap(0, 1, path="/a", sha256="a" * 64).with_oldest(1)
LATER = SETTLED.with_swap(0, 1, path="/b", sha256="b" * 64)
OLD, NEW = LATER.swaps


def origin(
    source: str,
    swap: ExpertSwap | None,
    *,
    shares: bool = False,
    has_peers: bool = True,
    fails: bool = False,
    maps: bool | None = None,
) -> str:
    """Of expert 1 on rank 1, which rank 0 has. `maps`: on devices, whether rank 0's memory is mapped here."""
    asked: list[str] = []

    def pull(rank: int, _layer: int, _expert: int, _swap: ExpertSwap | None, _pace: object) -> str | None:
        if not maps:
            return None
        asked.append(f"memory of rank {rank}")
        if fails:
            raise TransportError("given up", rank=1, peers=(0,))
        return "weights"

    def fetch(rank: int, _layer: int, _expert: int, _out: object, _pace: object, sha256: str) -> None:
        asked.append(f"rank {rank} {sha256[:1]}".strip())
        if fails:
            raise TransportError("gone", rank=1, peers=(0,))

    def read(_layer: int, _expert: int, swap: ExpertSwap | None, _pace: object) -> str:
        asked.append("checkpoint" if swap is None else f"file {swap.path}")
        return "weights"

    nothing = SimpleNamespace(data=SimpleNamespace(numpy=lambda: SimpleNamespace(data=b"")))
    experts = SimpleNamespace(
        shares_weights=shares, reads_peers=maps is not None, read=read, pull=pull, empty=lambda *_: (nothing, nothing)
    )
    runner: Any = SimpleNamespace(experts=experts)
    job: Any = SimpleNamespace(
        message=SimpleNamespace(source=source),
        sources=Counter(),
        pace=SimpleNamespace(cancelled=False),
        current=lambda: ExpertMap.contiguous(1, 2, 1),
        versions=lambda: SETTLED,
        peers=SimpleNamespace(fetch=fetch) if has_peers else None,
    )
    Stager(runner, rank=1, system=RealSystem(), deliver=lambda _: None)._read(job, 0, 1, swap)
    way = {"m": "mapped", "r": "peer", "c": "disk", "f": "disk"}[asked[-1][0]]
    assert job.sources == {way: 1}
    return ", ".join(asked)


@pytest.mark.parametrize("shares", [False, True])
def test_origins(shares: bool) -> None:
    for source in ("auto", "peer"):
        assert origin(source, OLD, shares=shares) == "rank 0 a"
        assert origin(source, NEW, shares=shares) == "file /b"  # no slot holds it yet
        assert origin(source, OLD, shares=shares, has_peers=False) == "file /a"
    assert origin("checkpoint", OLD, shares=shares) == "file /a"
    assert origin("auto", OLD, shares=shares, fails=True) == "rank 0 a, file /a"
    with pytest.raises(TransportError):
        origin("peer", OLD, shares=shares, fails=True)
    assert origin("auto", None, shares=shares) == ("checkpoint" if shares else "rank 0")
    assert origin("peer", None, shares=shares) == "rank 0"


def test_origins_on_devices() -> None:
    for source in ("auto", "peer"):
        for swap in (None, OLD):
            assert origin(source, swap, maps=True) == "memory of rank 0"
            assert origin(source, swap, maps=True, has_peers=False) == "memory of rank 0"
        assert origin(source, NEW, maps=True) == "file /b"
    assert origin("checkpoint", None, maps=True) == "checkpoint"
    assert origin("auto", None, maps=True, fails=True) == "memory of rank 0, checkpoint"
    assert origin("auto", OLD, maps=True, fails=True) == "memory of rank 0, file /a"
    assert origin("auto", None, maps=False) == "checkpoint"
    assert origin("peer", None, maps=False) == "rank 0"
    assert origin("peer", OLD, maps=False) == "rank 0 a"
    assert origin("peer", None, maps=False, has_peers=False) == "checkpoint"
    with pytest.raises(TransportError, match="gone"):
        origin("peer", None, maps=True, fails=True)


def test_versions_have_to_follow() -> None:
    def staged(versions: object) -> ModelVersions:
        job: Any = SimpleNamespace(message=SimpleNamespace(versions=versions), versions=lambda: SETTLED)
        return Stager(SimpleNamespace(), rank=0, system=RealSystem(), deliver=lambda _: None)._versions(job)  # type: ignore[arg-type]

    assert staged(None) == SETTLED
    assert staged(LATER.to_json()) == LATER
    for versions in (ModelVersions(), ModelVersions().with_swap(0, 1, path="/c", sha256="c" * 64)):
        with pytest.raises(ConfigError, match=r"do not follow from those in force, 1\.\.1"):
            staged(versions.to_json())
    with pytest.raises(ConfigError, match="expected an object"):
        staged({"oldest": 0})
