"""A generation's transport that knows its domains: `DomainTransport`, and how it is made of a plain one.

It is what HierarchicalDispatch needs: all ranks, this rank's domain, and which ranks are in which. Where every domain is a
host of its own, its ranks have a transport of theirs, which waits for nobody outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.comm.hierarchical import HierarchicalTransport
from switchgear_runtime.comm.transport import Transport, TransportStats


class DomainTransport:
    """A Transport, by `world`. `inner`: of the ranks of this rank's domain, by their places; None: they have none."""

    def __init__(self, world: Transport, inner: Transport | None, domains: Domains) -> None:
        assert domains.num_ranks == world.world_size
        assert inner is None or inner.world_size == len(domains.members[domains.at(world.rank)[0]])
        self.world = world
        self.inner = inner
        self.domains = domains

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.world_size

    def all_gather(self, header: bytes, *, timeout_s: float) -> list[bytes]:
        return self.world.all_gather(header, timeout_s=timeout_s)

    def all_to_all_v(self, send: Sequence[memoryview | bytes], *, timeout_s: float) -> list[memoryview]:
        return self.world.all_to_all_v(send, timeout_s=timeout_s)

    def barrier(self, *, timeout_s: float) -> None:
        self.world.barrier(timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        self.world.abort(reason)
        if self.inner is not None:
            self.inner.abort(reason)

    def close(self) -> None:
        self.world.close()
        if self.inner is not None:
            self.inner.close()

    def stats(self) -> TransportStats:
        parts = [self.world.stats()] + ([self.inner.stats()] if self.inner is not None else [])
        return TransportStats(
            num_calls=sum(part.num_calls for part in parts),
            sent_bytes=sum(part.sent_bytes for part in parts),
            received_bytes=sum(part.received_bytes for part in parts),
        )


def with_domains(
    control: Transport, domains: Domains, on_device: Callable[[Transport], Transport] = lambda transport: transport
) -> DomainTransport:
    """`on_device`: what puts NCCL or peer memory beside a transport of the hosts, where ranks have GPUs."""
    inner: Transport | None = None
    if isinstance(control, HierarchicalTransport) and control.hosts == domains.members:
        inner = control.inside
    world = on_device(control)
    try:
        return DomainTransport(world, None if inner is None else on_device(inner), domains)
    except BaseException:
        world.close()
        raise
