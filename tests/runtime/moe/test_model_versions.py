"""Model versions against a slow table, and everything that is none is a ConfigError."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.model_versions import LIVE_SWAPS_MAX, ExpertSwap, ModelVersions


def sha(number: int) -> str:
    return f"{number:064x}"


def test_the_example() -> None:
    versions = ModelVersions().with_swap(0, 5, path="/a", sha256=sha(1)).with_oldest(1)
    versions = versions.with_swap(3, 1, path="/b", sha256=sha(2))
    first, second = versions.swaps
    assert (versions.latest, versions.settled(0, 5), versions.live, versions.num_variants) == (2, first, (second,), 1)
    assert versions.settled(3, 1) is None
    settled = versions.with_oldest(2)
    assert (settled.settled_of(3), settled.num_variants, settled.knows(1)) == ({1: second}, 0, False)
    again = settled.with_swap(0, 5, path="/c", sha256=sha(3))
    assert (again.seen(2, 0, 5), again.seen(3, 0, 5)) == (first, again.swaps[-1])
    assert [swap.path for swap in again.with_oldest(3).swaps] == ["/b", "/c"]


@pytest.mark.parametrize("seed", range(20))
def test_every_version_sees_what_it_saw(seed: int) -> None:
    draw = random.Random(seed)
    places = [(layer, expert) for layer in range(2) for expert in range(3)]
    tables: list[dict[tuple[int, int], str]] = [{}]  # by version: the digests in place of the checkpoint's weights
    versions = ModelVersions()
    for _ in range(60):
        before = versions
        if draw.random() < 0.6 and len(versions.live) < LIVE_SWAPS_MAX:
            place = draw.choice(places)
            versions = versions.with_swap(*place, path="/x", sha256=sha(len(tables)))
            tables.append({**tables[-1], place: sha(len(tables))})
        else:
            versions = versions.with_oldest(draw.randint(versions.oldest, versions.latest))
        assert versions.follows(before), f"seed {seed}"
        assert versions.latest == len(tables) - 1, f"seed {seed}"
        assert ModelVersions.from_json(versions.to_json()) == versions
        for layer, expert in places:
            for version in range(versions.oldest, versions.latest + 1):
                seen = versions.seen(version, layer, expert)
                assert (seen.sha256 if seen else None) == tables[version].get((layer, expert)), f"seed {seed}"
            assert versions.settled(layer, expert) == versions.settled_of(layer).get(expert)
        variants = [versions.live_of(layer) for layer in range(2)]
        assert max(map(len, variants)) == versions.num_variants
        assert len(versions.swaps) <= len(places) + LIVE_SWAPS_MAX


def test_follows_refuses_another_past() -> None:
    base = ModelVersions().with_swap(0, 1, path="/a", sha256=sha(1))
    other = ModelVersions().with_swap(0, 1, path="/a", sha256=sha(2))
    assert not other.follows(base)
    assert not ModelVersions().follows(base)
    assert not base.follows(base.with_oldest(1))
    assert base.with_swap(0, 1, path="/b", sha256=sha(3)).with_oldest(2).follows(base)
    assert base.digest() not in (other.digest(), base.with_oldest(1).digest(), ModelVersions().digest(), 0)


def test_limits_are_named() -> None:
    versions = ModelVersions()
    for number in range(LIVE_SWAPS_MAX):
        versions = versions.with_swap(0, number, path="/a", sha256=sha(number))
    with pytest.raises(ConfigError, match=f"at most {LIVE_SWAPS_MAX} at a time"):
        versions.with_swap(1, 0, path="/a", sha256=sha(9))
    assert versions.with_oldest(1).with_swap(1, 0, path="/a", sha256=sha(9)).num_variants == LIVE_SWAPS_MAX - 1
    with pytest.raises(ConfigError, match="expert 7 of MoE layer 0"):
        versions.check(num_layers=1, num_experts=7)
    versions.check(num_layers=1, num_experts=8)
    with pytest.raises(ConfigError, match="oldest"):
        versions.with_oldest(99)
    with pytest.raises(ConfigError, match="forgotten"):
        versions.with_oldest(2).with_oldest(1)


SWAP = asdict(ExpertSwap(version=1, layer=0, expert=0, path="/a", sha256=sha(1)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"oldest": 0},
        {"oldest": "0", "swaps": []},
        {"oldest": True, "swaps": []},
        {"oldest": 1, "swaps": []},
        {"oldest": -1, "swaps": []},
        {"oldest": 0, "swaps": {}},
        {"oldest": 0, "swaps": [], "more": 1},
        {"oldest": 0, "swaps": [1]},
        {"oldest": 0, "swaps": [SWAP, SWAP]},
        {"oldest": 2, "swaps": [SWAP, {**SWAP, "version": 2}]},
        {"oldest": 0, "swaps": [{**SWAP, "version": 0}]},
        {"oldest": 0, "swaps": [{**SWAP, "layer": -1}]},
        {"oldest": 0, "swaps": [{**SWAP, "expert": 1.0}]},
        {"oldest": 0, "swaps": [{**SWAP, "path": ""}]},
        {"oldest": 0, "swaps": [{**SWAP, "path": "x" * 5000}]},
        {"oldest": 0, "swaps": [{**SWAP, "sha256": "A" * 64}]},
        {"oldest": 0, "swaps": [{**SWAP, "sha256": sha(1) + "\n"}]},
        {"oldest": 0, "swaps": [{**SWAP, "extra": 1}]},
    ],
    ids=repr,
)
def test_what_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="model versions"):
        ModelVersions.from_json(value)
