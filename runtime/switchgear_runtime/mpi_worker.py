"""A rank that `mpiexec` or `srun` started: `python -m switchgear_runtime.mpi_worker`.

The job's rank 0 reads all ranks' configurations, one line of JSON, from stdin (so that no token shows in a process list)
and broadcasts them; each takes its own and goes on as any other rank. A rank that fails ends the job, as MPI would have it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import msgspec

from switchgear_runtime.comm.mpi import load_mpi
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.rank_worker import EXIT_FAILED, RankWorker, RankWorkerConfig, configure_logging

CONFIGS_BYTES_MAX = 64 << 20
FINALIZE_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


def read_configs(mpi: Any) -> list[RankWorkerConfig]:
    """The same on all ranks. No deadline: the server has one for the ranks to connect, and ends the job at it."""
    world = mpi.COMM_WORLD
    line = sys.stdin.buffer.readline(CONFIGS_BYTES_MAX) if world.rank == 0 else b""
    length = bytearray(len(line).to_bytes(8, "little"))
    world.Bcast([length, mpi.BYTE], 0)
    text = bytearray(line) if world.rank == 0 else bytearray(int.from_bytes(length, "little"))
    world.Bcast([text, mpi.BYTE], 0)
    configs = msgspec.json.decode(bytes(text), type=list[RankWorkerConfig])
    if len(configs) != world.size:
        raise ConfigError(
            f"the MPI job has {world.size} processes for ranks={len(configs)}; mpi_command must start {{ranks}} of them"
        )
    return configs


def _end(status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    faulthandler.enable()
    try:
        mpi = load_mpi()
        config = read_configs(mpi)[mpi.COMM_WORLD.rank]
        configure_logging(config.rank, config.log_level)
        RankWorker(msgspec.structs.replace(config, host_name=mpi.Get_processor_name())).run()
    except Exception:
        log.exception("the rank failed")
        _end(EXIT_FAILED)
    # All ranks have agreed to stop; without this, mpiexec would call it a crash. What hangs in it need not be waited for.
    watchdog = threading.Timer(FINALIZE_TIMEOUT_S, os._exit, (0,))
    watchdog.daemon = True
    watchdog.start()
    mpi.Finalize()
    _end(0)


if __name__ == "__main__":
    main()
