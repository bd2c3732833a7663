"""From a generation's descriptor to this rank's transport: `open_transport`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.generation import GenerationDescriptor

if TYPE_CHECKING:
    from switchgear_runtime.comm.loopback import LoopbackHub


def open_transport(
    kind: str,
    descriptor: GenerationDescriptor,
    rank: int,
    *,
    mailbox_bytes: int,
    timeout_s: float,
    hub: LoopbackHub | None = None,
) -> Transport:
    """Join `descriptor.channel` as `rank`; returns once all ranks have. `hub` is where loopback ranks meet.

    Raises TransportTimeout naming the ranks that did not come within `timeout_s`.
    """
    if kind == "loopback":
        if hub is None:
            raise ConfigError("transport='loopback' needs its ranks in one process; use transport='shm'")
        return hub.open(rank, descriptor.channel, world_size=descriptor.world_size, timeout_s=timeout_s)
    if kind == "shm":
        from switchgear_runtime.comm.shm import ShmTransport  # loads the native library

        return ShmTransport(descriptor.channel, rank, descriptor.world_size, mailbox_bytes, timeout_s)
    raise ConfigError(f"transport={kind!r} is unknown; choose one of loopback, shm")
