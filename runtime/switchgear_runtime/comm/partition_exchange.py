"""An exchange between the ranks of one's own domain: `PartitionExchange`, over the exchange of all ranks.

For domains that have no transport of their own (a GPU domain of several hosts, several in one host). All ranks call at
once, each with parts for its domain, and nothing crosses between domains but the agreement that every exchange begins
with.
"""

from __future__ import annotations

from collections.abc import Sequence

from switchgear_runtime.comm.device_exchange import DeviceExchange, Parts


class PartitionExchange:
    """A DeviceExchange of `members`, ascending, by their places."""

    def __init__(self, exchange: DeviceExchange, members: Sequence[int], num_ranks: int) -> None:
        self._exchange = exchange
        self._members = members
        self._num_ranks = num_ranks

    def exchange(self, send: Sequence[Parts], *, timeout_s: float) -> list[Parts]:
        received = self._exchange.exchange([self._among_all(parts) for parts in send], timeout_s=timeout_s)
        return [Parts(parts.data, self._among_members(parts.offsets)) for parts in received]

    def _among_all(self, parts: Parts) -> Parts:
        """The same bytes, with empty parts for the ranks of other domains."""
        offsets, place = [parts.offsets[0]], 0
        for rank in range(self._num_ranks):
            place += rank in self._members
            offsets.append(parts.offsets[place])
        return Parts(parts.data, offsets)

    def _among_members(self, offsets: Sequence[int]) -> list[int]:
        return [offsets[0], *(offsets[member + 1] for member in self._members)]
