"""Model versions in a running cluster: `Versioning`, what ranks compute with, and when old versions may go.

    load    the same map, one version more: once it is in force, new sequences get it, running ones keep theirs
    settle  the same map, without the versions that no live sequence has: the ranks' extra slots go

Both are migrations that move no expert, so that versions flip at the step boundaries at which maps do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions

LOOK_S = 0.5  # how often it is looked whether the last sequence of an old version has ended
RETRY_S = 30.0  # until the next attempt to settle, after one that failed


class Versioning:
    """`oldest_live`: the oldest version that a live sequence has, new ones' if none has an older; None: new ones'. Times
    are the caller's."""

    def __init__(self, oldest_live: Callable[[], int] | None = None) -> None:
        self.in_force = ModelVersions()
        self.look_at_s: float | None = None  # None: there is no old version
        self._oldest_live = oldest_live or (lambda: self.in_force.latest)
        self._number = 0  # of the latest version ever proposed: a number names one version for ever

    def loaded(self, layer: int, expert: int, path: str, sha256: str) -> ModelVersions:
        """With one version more. ConfigError if that is too many, or if a version in force has another file of this name:
        a rank that joins later could then read one of the two only."""
        for known in self.in_force.swaps:
            if known.path == path and known.sha256 != sha256:
                raise ConfigError(
                    f"path={path!r} was loaded as version {known.version} with other contents, which are in force; give "
                    "the new file a name of its own"
                )
        swap = ExpertSwap(version=self._number + 1, layer=layer, expert=expert, path=path, sha256=sha256)
        loaded = replace(self.in_force, swaps=(*self.in_force.swaps, swap))
        self._number = swap.version
        return loaded

    def settled(self, now_s: float) -> ModelVersions | None:
        """Without the versions that nobody needs any more; None if all are needed, or if it is not time to look."""
        if self.look_at_s is None or self.look_at_s > now_s:
            return None
        self.look_at_s = now_s + LOOK_S
        oldest = self._oldest_live()
        return self.in_force.with_oldest(oldest) if oldest > self.in_force.oldest else None

    def num_read(self, versions: ModelVersions) -> int:
        """Files that each rank reads to compute with these."""
        return len(set(versions.swaps) - set(self.in_force.swaps))

    def committed(self, versions: ModelVersions, now_s: float) -> None:
        self.in_force = versions
        self.look_at_s = now_s + LOOK_S if versions.live else None

    def failed(self, now_s: float) -> None:
        """Ranks did not take what was proposed."""
        if self.look_at_s is not None:
            self.look_at_s = now_s + RETRY_S
