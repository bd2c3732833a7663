"""What a rank computes with, by the setting `device`: `backend_of`."""

from __future__ import annotations

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model.backend import Backend, HostBackend


def backend_of(config: EngineConfig, rank: int, *, native: bool) -> Backend:
    """A device's libraries are loaded for who asks for one only."""
    if config.device == "cpu":
        return HostBackend(config, rank, native=native)
    from switchgear_runtime.cuda.backend import DeviceBackend

    return DeviceBackend(config, rank)
