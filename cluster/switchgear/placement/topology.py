"""Which ranks there are, and which of them share a host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchgear_runtime.errors import ConfigError

RANKS_MAX = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """`hosts[r]` names the host of rank r."""

    num_ranks: int
    hosts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= RANKS_MAX:
            raise ConfigError(f"topology: num_ranks={self.num_ranks} is not in 1..{RANKS_MAX}")
        if len(self.hosts) != self.num_ranks:
            raise ConfigError(
                f"topology: {len(self.hosts)} hosts for num_ranks={self.num_ranks}; name one for each rank"
            )

    @classmethod
    def even(cls, num_ranks: int, num_hosts: int = 1) -> Topology:
        """Consecutive ranks on each host.

        >>> Topology.even(4, 2).hosts
        ('host-0', 'host-0', 'host-1', 'host-1')
        """
        return cls(
            num_ranks=num_ranks, hosts=tuple(f"host-{rank * num_hosts // num_ranks}" for rank in range(num_ranks))
        )

    @property
    def host_of_rank_R(self) -> NDArray[np.int32]:
        """Hosts numbered in the order in which their first rank comes."""
        number = {host: index for index, host in enumerate(dict.fromkeys(self.hosts))}
        return np.array([number[host] for host in self.hosts], np.int32)

    @property
    def num_hosts(self) -> int:
        return len(set(self.hosts))
