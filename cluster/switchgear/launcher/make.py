"""The launcher a configuration asks for: `make_launcher`."""

from __future__ import annotations

from switchgear.config import ServeConfig
from switchgear.launcher.base import Launcher, OnExit


def make_launcher(config: ServeConfig, on_exit: OnExit, *, name: str, one_host: bool) -> Launcher:
    """Imported on demand: a local cluster needs no Ray. `one_host`: ranks must not spread over nodes."""
    if config.launcher == "local":
        from switchgear.launcher.local import LocalLauncher

        return LocalLauncher(on_exit)
    if config.launcher == "mpi":
        from switchgear.launcher.mpi import MpiLauncher

        return MpiLauncher(on_exit, num_ranks=config.ranks, command=config.mpi_command, address=config.mpi_address)
    from switchgear.launcher.ray import RayLauncher

    return RayLauncher(
        on_exit,
        name=name,
        num_ranks=config.ranks,
        cpus_per_rank=config.ray_cpus_per_rank,
        one_host=one_host,
        address=config.ray_address,
        timeout_s=config.start_timeout_s,
    )
