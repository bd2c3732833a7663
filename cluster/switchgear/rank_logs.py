"""The end of what a rank's process wrote, for whoever asks why it ended: `RankLogs`."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from switchgear.launcher.base import Launcher, LaunchError
from switchgear_runtime.errors import CheckpointError, ConfigError, RankFailed, SwitchgearError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.messages import Fault

log = logging.getLogger(__name__)


class RankLogs:
    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    async def tail(self, rank: int) -> str:
        try:
            return await self._launcher.log_tail(rank)
        except LaunchError:
            return ""

    async def tell(self, rank: int) -> None:
        """Into the server's log."""
        tail = await self.tail(rank)
        if tail:
            log.warning("the end of rank %d's log:\n%s", rank, tail)

    async def start_error(self, reason: str, fault: Fault | None, ranks: Iterable[int]) -> SwitchgearError:
        """A rank's own error, in its own class where that is the user's to fix; else the reason, and the end of what
        the first rank wrote that wrote something."""
        if fault is not None:
            kinds: dict[str, type[SwitchgearError]] = {"ConfigError": ConfigError, "CheckpointError": CheckpointError}
            return kinds[fault.kind](fault.message) if fault.kind in kinds else RankFailed(reason)
        for rank in ranks:
            tail = await self.tail(rank)
            if tail:
                return RankFailed(f"{reason}\nThe end of rank {rank}'s log:\n{tail}")
        return RankFailed(reason)


def tell_fault(fault: Fault, descriptor: GenerationDescriptor | None) -> None:
    """Into the server's log; loudly, unless the fault is of a generation that is over."""
    current = descriptor is None or fault.generation == descriptor.generation
    log.log(
        logging.WARNING if current else logging.DEBUG,
        "rank %d gave up generation %d, step %d: %s",
        fault.rank,
        fault.generation,
        fault.step,
        fault.message,
    )
