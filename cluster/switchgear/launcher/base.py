"""What a cluster needs of whoever starts its ranks: the `Launcher` protocol. It knows processes, not generations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from switchgear_runtime.rank_worker import RankWorkerConfig

OnExit = Callable[[int, str], None]
"""(rank, reason): its process is seen gone. The reason reads on after "rank 2", as in "was killed by SIGKILL"."""


class LaunchError(RuntimeError):
    """A launcher cannot start, or cannot do what was asked; the text says what to change."""


class Launcher(Protocol):
    """All coroutines run on one event loop; `on_exit`, given at construction, is called on its thread, once a start."""

    async def open(self) -> str:
        """Get ready to start ranks. Returns this process's address as the ranks see it, for the link server to bind."""
        ...

    async def start(self, rank: int, config: RankWorkerConfig) -> None:
        """Start the process; it reports by itself, over its link. LaunchError if not even that works."""
        ...

    async def kill(self, rank: int) -> None:
        """SIGKILL, then wait until the process is seen gone (`on_exit` has been called then). LaunchError if it
        stays."""
        ...

    async def sweep(self, channel: str) -> None:
        """Remove what a dead generation's transport may have left on the ranks' host."""
        ...

    def release(self, rank: int) -> None:
        """Its process is gone and the rank will not come back: give up the place that is kept for it, if any."""
        ...

    async def log_tail(self, rank: int) -> str:
        """The end of what the rank's process wrote, for an error message. Empty if it is not at hand."""
        ...

    async def close(self, timeout_s: float) -> None:
        """End everything that was started and remove every temporary file. Idempotent."""
        ...
