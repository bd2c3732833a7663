"""How ranks get experts from each other: `ExpertPeers`."""

from __future__ import annotations

from typing import Protocol

from switchgear_runtime.migration.pace import Pace


class ExpertPeers(Protocol):
    """One rank's way to the experts of the others of its generation."""

    def fetch(
        self,
        source: int,
        moe_layer: int,
        expert: int,
        out: tuple[memoryview, memoryview],
        pace: Pace,
        sha256: str = "",
    ) -> None:
        """Fill `out` (gate and up, down) with the packed weights that rank `source` computes with: the checkpoint's, or
        those of the file with this digest. Raises TransportError naming it, also where it has others of this expert, and
        what `pace` raises."""
        ...

    def close(self) -> None:
        """End it, and whatever waits in `fetch`; from any thread."""
        ...
