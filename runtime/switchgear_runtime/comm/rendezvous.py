"""From a generation's descriptor to this rank's transport: `open_transport`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from switchgear_runtime.comm.domains import Domains
from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import LIBRARY_DISPATCHES
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
    network: Network | None = None,
    device: str = "cpu",
    dispatch: str = "flat",
) -> Transport:
    """Join `descriptor.channel` as `rank`; returns once all ranks have. `hub` is where loopback ranks meet.

    `auto`: shm, or on several hosts shm inside and gloo between. Raises TransportTimeout naming the ranks that did not
    come within `timeout_s`. On a GPU (`device`: cuda:0), auto and nccl put NCCL beside those. `dispatch`: of
    EngineConfig; hierarchical, or auto where ranks are in several domains, makes it a DomainTransport.
    """
    on_gpus = device.startswith("cuda") and kind in ("auto", "nccl")
    over_nccl = on_gpus and dispatch not in LIBRARY_DISPATCHES  # which bring their own
    control = _open_control(
        "auto" if on_gpus else kind,
        descriptor,
        rank,
        mailbox_bytes=mailbox_bytes,
        timeout_s=timeout_s,
        hub=hub,
        network=network,
    )
    domains = Domains.of(descriptor.domain_names)
    by_domain = dispatch == "hierarchical" or (dispatch == "auto" and domains.are_worth_it)
    if not (over_nccl or by_domain):
        return control
    try:
        on_device = _nccl_beside(device, required=kind == "nccl", timeout_s=timeout_s) if over_nccl else _as_it_is
        if not by_domain:
            return on_device(control)
        from switchgear_runtime.comm.domain_transport import with_domains

        return with_domains(control, domains, on_device)
    except BaseException:
        control.close()
        raise


def _open_control(
    kind: str,
    descriptor: GenerationDescriptor,
    rank: int,
    *,
    mailbox_bytes: int,
    timeout_s: float,
    hub: LoopbackHub | None,
    network: Network | None,
) -> Transport:
    """Of the hosts."""
    world_size = descriptor.world_size
    num_hosts = len(set(descriptor.hosts))
    if kind == "loopback":
        if hub is None:
            raise ConfigError("transport='loopback' needs its ranks in one process; use transport='shm'")
        return hub.open(rank, descriptor.channel, world_size=world_size, timeout_s=timeout_s)
    if kind == "shm" and num_hosts > 1:
        raise ConfigError(f"transport='shm' needs one host, but the ranks are on {num_hosts}; use transport='auto'")
    # Each import loads a library that the others do not need.
    if kind == "shm" or (kind == "auto" and num_hosts <= 1):
        from switchgear_runtime.comm.shm import ShmTransport

        return ShmTransport(descriptor.channel, rank, world_size, mailbox_bytes, timeout_s)
    if kind not in ("auto", "gloo", "mpi"):
        raise ConfigError(f"transport={kind!r} is unknown; choose one of auto, loopback, shm, gloo, nccl, mpi")
    if kind == "mpi":
        from switchgear_runtime.comm.mpi import MpiTransport

        return MpiTransport(descriptor.channel, rank, world_size, timeout_s=timeout_s)
    if network is None:
        raise ConfigError(f"transport={kind!r} needs a store in which its ranks meet")
    if kind == "gloo":
        from switchgear_runtime.comm.gloo import GlooTransport

        return GlooTransport(network, rank, world_size, mailbox_bytes=mailbox_bytes, timeout_s=timeout_s)
    from switchgear_runtime.comm.hierarchical import HierarchicalTransport

    return HierarchicalTransport(
        descriptor.channel, network, rank, descriptor.hosts, mailbox_bytes=mailbox_bytes, timeout_s=timeout_s
    )


def _nccl_beside(device: str, *, required: bool, timeout_s: float) -> Callable[[Transport], Transport]:
    import torch

    from switchgear_runtime.comm.nccl import over_nccl

    return lambda control: over_nccl(control, torch.device(device), required=required, timeout_s=timeout_s)


def _as_it_is(control: Transport) -> Transport:
    return control
