"""`switchgear bench transport`: time of an exchange over each transport, against memcpy."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAILBOX_BYTES = 32 << 20
SIZES = tuple(64 << shift for shift in range(19))  # 64 B to 16 MiB


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of bytes, such as 64,4096") from None
    if any(size < 8 or size % 8 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} has a size that is not a positive multiple of 8")
    return sizes


def _size_name(num_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor and num_bytes % factor == 0:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} B"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the C entries, of what Python callers see, and of the all-gather of a header."""
    cells = {(row["call"], row["num_bytes"], row["contender"]): row for row in rows}
    sizes = sorted({row["num_bytes"] for row in rows if row["call"] == "all_to_all_v"})

    def time_us(size: int, name: str, field: str = "time_us") -> str:
        cell = cells.get(("all_to_all_v", size, name))
        return "-" if cell is None or field not in cell else f"{cell[field]:.2f}"

    def ratio(size: int, name: str, field: str) -> str:
        cell = cells.get(("all_to_all_v", size, name))
        return "-" if cell is None or cell[field] is None else f"{cell[field]:.2f}"

    title = [
        "message",
        "memcpy",
        "shm",
        "shm held",
        "shm in place",
        "MPICH",
        "Open MPI",
        "shm x best MPI",
        "shm x memcpy",
    ]
    rest = ["writing + memcpy", "writing + shm in place", "header beside it"]
    lines = ["Microseconds an exchange, by the C entries:", "", _line(title + rest), _line(["---:"] * 12)]
    lines += [
        _line(
            [
                _size_name(size),
                *(time_us(size, name) for name in ("memcpy", "shm", "shm held", "shm in place", "mpich", "openmpi")),
                ratio(size, "shm", "ratio_to_best_mpi"),
                ratio(size, "shm", "ratio_to_memcpy"),
                time_us(size, "memcpy", "written_us"),
                time_us(size, "shm in place", "written_us"),
                time_us(size, "shm", "crossing_us"),
            ]
        )
        for size in sizes
    ]
    python = ["shm python", "mpich python", "openmpi python", "gloo python"]
    lines += ["", "Microseconds an exchange, from Python:", ""]
    lines += [_line(["message", *(name.removesuffix(" python") for name in python)]), _line(["---:"] * 5)]
    lines += [_line([_size_name(size), *(time_us(size, name) for name in python)]) for size in sizes]
    gathers = [row for row in rows if row["call"] == "all_gather"]
    lines += [
        "",
        "All-gather of a header: " + ", ".join(f"{r['contender']} {r['time_us']:.2f} us" for r in gathers) + ".",
    ]
    return "\n".join(lines)


class TransportCommand:
    """Two ranks on two cores exchange messages; one JSON file with all rows."""

    help = "measure all_to_all_v over shm, MPICH, Open MPI and gloo against memcpy"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=_sizes, default=list(SIZES), help="bytes (default: 64 to 16 Mi, doubling)")
        parser.add_argument("--num-repeats", type=int, default=15, help="medians are over this many runs (default: 15)")
        parser.add_argument(
            "--mailbox-bytes", type=int, default=MAILBOX_BYTES, help="of the shm channel (default: 32 Mi)"
        )
        parser.add_argument(
            "--mpi", type=Path, default=Path("build/mpi"), help="where `make mpi` put both MPIs (default: build/mpi)"
        )
        parser.add_argument("--no-gloo", action="store_true", help="leave out gloo")
        parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear_bench import machine
        from switchgear_bench.transport import LIBMPI, mpi_sites, run

        sites = mpi_sites(arguments.mpi)
        missing = LIBMPI.keys() - {site.name for site in sites}
        if missing:
            print(f"Not found under {arguments.mpi}: {', '.join(sorted(missing))}; `make mpi` installs both.")
        versions, found = run(
            arguments.sizes,
            num_repeats=arguments.num_repeats,
            mailbox_bytes=arguments.mailbox_bytes,
            sites=sites,
            gloo=not arguments.no_gloo,
        )
        rows = list(found)
        header = machine.describe() | {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "scheduler": {os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}.get(os.sched_getscheduler(0), "other"),
        }
        print(f"{header['hardware']}, 2 ranks on {min(2, header['cores'])} cores\n\n{markdown(rows)}\n")
        print("Every received word was read, and is what the peer wrote.")
        if arguments.output:
            arguments.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(f"Wrote {arguments.output}.")
        return 0


TRANSPORT = TransportCommand()
