"""Which weights each expert has in each version of the model: `ModelVersions`. Pure, imports no torch.

Version 0 is the checkpoint. An `ExpertSwap` makes the next version: one expert gets the weights of a file. A token of
version v computes an expert with its newest swap that is not newer than v, else with the checkpoint's.

    settled    the swap that every token of `oldest` or later sees, until a newer one: what the expert map's slots hold
    live       swaps after `oldest`: some sequences see them and some do not, so ranks hold these weights beside the slots

Example: swaps 1 (layer 0, expert 5) and 2 (layer 3, expert 1), oldest 1. Slots of expert 5 hold swap 1; swap 2 is live,
and goes into slots when the last sequence of version 1 has ended and `oldest` becomes 2.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from switchgear_runtime.errors import ConfigError

LIVE_SWAPS_MAX = 8  # at a time, over all layers: every rank holds the weights of each
SWAPS_MAX = 4096  # settled ones included
VERSION_MAX = (1 << 31) - 1
PATH_BYTES_MAX = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSwap:
    """`layer`: among MoE layers. `sha256`: of the whole file, in hexadecimal; each rank that reads it compares."""

    version: int
    layer: int
    expert: int
    path: str
    sha256: str

    def __post_init__(self) -> None:
        for name in ("version", "layer", "expert"):
            value = getattr(self, name)
            if type(value) is not int or not (name == "version") <= value <= VERSION_MAX:
                raise ConfigError(f"model versions: {name}={value!r} of a swap is not a number that it can have")
        if type(self.path) is not str or not 0 < len(self.path.encode("utf-8", "replace")) <= PATH_BYTES_MAX:
            raise ConfigError(f"model versions: the path of version {self.version} is not a path")
        if type(self.sha256) is not str or not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"model versions: sha256={self.sha256!r} of version {self.version} is not 64 hex digits")

    @property
    def place(self) -> tuple[int, int]:
        return self.layer, self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersions:
    """Immutable. `oldest`: no sequence has an older version. `swaps`: by version, one each; those that nobody of
    `oldest` or later sees are not kept."""

    oldest: int = 0
    swaps: tuple[ExpertSwap, ...] = ()

    def __post_init__(self) -> None:
        if type(self.oldest) is not int or not 0 <= self.oldest <= self.latest:
            raise ConfigError(f"model versions: oldest={self.oldest!r} is not one of 0..{self.latest}")
        if len(self.swaps) > SWAPS_MAX:
            raise ConfigError(
                f"model versions: {len(self.swaps)} swapped experts, at most {SWAPS_MAX}; merge them into a checkpoint "
                "and start from that"
            )
        versions = [swap.version for swap in self.swaps]
        if sorted(set(versions)) != versions:
            raise ConfigError(f"model versions: swaps have versions {versions}, which do not rise")
        if len(self.live) > LIVE_SWAPS_MAX:
            raise ConfigError(
                f"model versions: {len(self.live)} swapped experts that some sequences see and some do not, at most "
                f"{LIVE_SWAPS_MAX} at a time; load the next one when sequences of version {self.oldest} have ended"
            )
        if self._kept(self.oldest) != self.swaps:
            raise ConfigError(f"model versions: a swap is there that nobody of version {self.oldest} or later sees")

    @property
    def latest(self) -> int:
        """What new sequences get."""
        return self.swaps[-1].version if self.swaps else 0

    def knows(self, version: int) -> bool:
        """Whether a sequence of this version can be computed."""
        return self.oldest <= version <= self.latest

    @property
    def live(self) -> tuple[ExpertSwap, ...]:
        """By version."""
        return tuple(swap for swap in self.swaps if swap.version > self.oldest)

    def live_of(self, layer: int) -> tuple[ExpertSwap, ...]:
        """The *variants* of a layer, in the order of their slots."""
        return tuple(swap for swap in self.live if swap.layer == layer)

    @property
    def num_variants(self) -> int:
        """Slots that each layer has for live swaps: what the layer with most of them needs."""
        layers = [swap.layer for swap in self.live]
        return max(map(layers.count, layers), default=0)

    def rows(self, versions_S: Sequence[int]) -> list[int]:
        """How many of the live swaps each version sees: its row of Variants.slots_NE."""
        live = [swap.version for swap in self.live]
        return [bisect_right(live, version) for version in versions_S]

    def seen(self, version: int, layer: int, expert: int) -> ExpertSwap | None:
        """Whose weights a token of `version` computes this expert with; None: the checkpoint's."""
        seen = (swap for swap in self.swaps if swap.place == (layer, expert) and swap.version <= version)
        return max(seen, key=lambda swap: swap.version, default=None)

    def settled(self, layer: int, expert: int) -> ExpertSwap | None:
        """What the expert's slots hold; None: the checkpoint's weights."""
        return self.seen(self.oldest, layer, expert)

    def settled_of(self, layer: int) -> dict[int, ExpertSwap]:
        """By expert."""
        return {swap.expert: swap for swap in self.swaps if swap.layer == layer and swap.version <= self.oldest}

    def with_swap(self, layer: int, expert: int, *, path: str, sha256: str) -> ModelVersions:
        """The next version: `latest` + 1."""
        swap = ExpertSwap(version=self.latest + 1, layer=layer, expert=expert, path=path, sha256=sha256)
        return replace(self, swaps=(*self.swaps, swap))

    def with_oldest(self, oldest: int) -> ModelVersions:
        """Once no sequence is older. Swaps go that a newer one, not newer than `oldest`, replaces."""
        if oldest < self.oldest:
            raise ConfigError(f"model versions: oldest={oldest} is before {self.oldest}, whose past is forgotten")
        return ModelVersions(oldest=oldest, swaps=self._kept(oldest))

    def _kept(self, oldest: int) -> tuple[ExpertSwap, ...]:
        newest = {swap.place: swap.version for swap in self.swaps if swap.version <= oldest}
        return tuple(s for s in self.swaps if s.version > oldest or s.version == newest[s.place])

    def follows(self, before: ModelVersions) -> bool:
        """Whether every version that both know has the same weights, and none that was given out is unknown for being
        too new: what a step boundary may change `before` to."""
        if self.oldest < before.oldest or self.latest < before.latest:
            return False
        if self.oldest > before.latest:
            return True
        old = tuple(swap for swap in self.swaps if swap.version <= before.latest)
        return old == before._kept(self.oldest)

    def check(self, *, num_layers: int, num_experts: int) -> None:
        """ConfigError for a swap of an expert that the model does not have."""
        for swap in self.swaps:
            if swap.layer >= num_layers or swap.expert >= num_experts:
                raise ConfigError(
                    f"model versions: version {swap.version} is of expert {swap.expert} of MoE layer {swap.layer}; the "
                    f"model has {num_experts} experts in each of {num_layers} MoE layers"
                )

    def digest(self) -> int:
        """32 bits, the same on all ranks; 0 where nothing was ever swapped."""
        if not self.swaps:
            return 0
        rows = [f"{swap.version} {swap.layer} {swap.expert} {swap.sha256}" for swap in self.swaps]
        return zlib.crc32("\n".join([str(self.oldest), *rows]).encode())

    def to_json(self) -> dict[str, Any]:
        return {"oldest": self.oldest, "swaps": [asdict(swap) for swap in self.swaps]}

    @classmethod
    def from_json(cls, value: object) -> ModelVersions:
        """The inverse of `to_json`; ConfigError for anything else."""
        match value:
            case {"oldest": int(oldest), "swaps": [*rows], **more} if not more and len(rows) <= SWAPS_MAX:
                return cls(oldest=oldest, swaps=tuple(_swaps(rows)))
            case _:
                raise ConfigError(f"model versions: expected an object of oldest and at most {SWAPS_MAX} swaps")


def _swaps(rows: Iterable[object]) -> Iterable[ExpertSwap]:
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"version", "layer", "expert", "path", "sha256"}:
            raise ConfigError("model versions: a swap is an object of version, layer, expert, path and sha256")
        yield ExpertSwap(**row)
