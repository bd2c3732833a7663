"""What a transport needs that leaves its host: `Network`, and the rule about networks that are not trusted."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from switchgear_runtime.comm.store import KeyValueStore
from switchgear_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """`store`: where the ranks of this generation meet. `address`: of this host, the only one to listen on."""

    store: KeyValueStore
    address: str = "127.0.0.1"
    trusted: bool = False


def is_loopback(address: str) -> bool:
    """Whether what is sent from there stays on this host."""
    return ipaddress.ip_address(address).is_loopback


def check_network(address: str, *, trusted: bool) -> None:
    """ConfigError unless what leaves `address` stays on this host, or the network was declared trusted."""
    if not trusted and not is_loopback(address):
        raise ConfigError(
            f"trusted_network=False, but the ranks would exchange activations over {address}, unencrypted and "
            "unauthenticated; set trusted_network=True (--trusted-network) if only this cluster can reach that "
            "network, or keep all ranks on one host"
        )
