"""One rank of `switchgear bench transport`: connects to the driver's socket and runs the jobs that it sends.

A line of JSON each way. While another contender is measured, a rank sleeps in the read of its socket.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from switchgear_bench.transport_contenders import Contender, GlooContender, MpiContender, ShmContender


def _open(settings: dict[str, Any]) -> Contender:
    kind, num_bytes_max = settings["kind"], settings["num_bytes_max"]
    if kind == "shm":
        return ShmContender(settings["rank"], num_bytes_max, settings["channel"], settings["mailbox_bytes"])
    if kind == "gloo":
        return GlooContender(settings["rank"], num_bytes_max, Path(settings["folder"]))
    return MpiContender(num_bytes_max, settings["packages"], settings["libmpi"])


def serve(settings: dict[str, Any]) -> None:
    """Until the driver hangs up."""
    contender = _open(settings)
    cpus = settings["cpus"]
    os.sched_setaffinity(0, {cpus[contender.rank % len(cpus)]})  # after the libraries have seen all cores
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(settings["socket"])
        with connection.makefile("r") as lines, connection.makefile("w") as answers:

            def answer(message: dict[str, Any]) -> None:
                answers.write(json.dumps(message) + "\n")
                answers.flush()

            answer({"kind": settings["kind"], "rank": contender.rank, "version": contender.version})
            for line in lines:
                job = json.loads(line)
                try:
                    timing = contender.run(**job)
                    answer({name: getattr(timing, name) for name in ("write_ns", "exchange_ns", "mismatches")})
                except Exception as error:  # noqa: BLE001 - the driver reports it
                    answer({"error": f"{type(error).__name__}: {error}"})
    contender.close()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
