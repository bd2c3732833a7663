"""The launcher a configuration asks for: `make_launcher`."""

from __future__ import annotations

from switchgear.config import ServeConfig
from switchgear.launcher.base import Launcher, OnExit
from switchgear_runtime.config import EngineConfig


def make_launcher(config: ServeConfig, engine: EngineConfig, on_exit: OnExit, *, name: str) -> Launcher:
    """Imported on demand: a local cluster needs no Ray."""
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
        gpus_per_rank=config.ray_gpus_per_rank if engine.device == "cuda" else 0.0,
        ranks_per_domain=config.ray_ranks_per_domain,
        domain_label=config.ray_domain_label,
        one_host=engine.transport == "shm",  # ranks share memory, and must not spread over nodes
        address=config.ray_address,
        timeout_s=config.start_timeout_s,
    )
