"""One question: how long does a message take from one rank to another and back to use, over each transport and by memcpy?

Two ranks, a process and a core each, send each other a message of the same size at once. An iteration counts from the
written message until the receiver has read every word of what it got and found the sum that the peer's words have, so a
transport can neither skip bytes nor leave them for later. All contenders run the same loop in the same run, repetition by
repetition in turn; a cell is the median over the repetitions of the slower rank's mean time.

The bound is a copy within one process, with the same reading, both ranks at once. It stays within a core's own caches up
to their size, while a message has to cross to the other core's. How fast that is depends on whether the two cores share
an L3, which a virtual machine's may cease to do from one minute to the next. So every cell says what the all-gather of a
header took beside it, and ratios are medians over the repetitions, each within one.

`shm` lets go of a message once it has read it, as the next call into MPI's receive buffer does; `shm held` keeps it until
the second-next exchange, as Python callers may.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

NUM_RANKS = 2
ANSWER_TIMEOUT_S = 120.0
_REPETITION_S = 0.01  # of every cell; its iterations are what fits in there
_ITERATIONS_MIN, _ITERATIONS_MAX = 4, 30_000
_TRIALS = 3  # to find out how many fit
_CROSSINGS = 2_000
HEADER_BYTES = 64
LIBMPI = {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}
BASELINE = "memcpy"


@dataclass(frozen=True, kw_only=True, slots=True)
class MpiSite:
    """An installation of MPI with mpi4py, as `make mpi` makes them."""

    name: str
    prefix: Path

    @property
    def libmpi(self) -> Path:
        return self.prefix / "lib" / LIBMPI[self.name]

    @property
    def packages(self) -> Path:
        return self.prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"

    @property
    def launch(self) -> list[str]:
        """The command before the program. As root, which is not Open MPI's idea of a default."""
        settings = {
            "MPI4PY_LIBMPI": str(self.libmpi),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        settled = [f"{name}={value}" for name, value in settings.items()]
        return ["env", *settled, str(self.prefix / "bin" / "mpiexec"), "-n", str(NUM_RANKS)]

    def exists(self) -> bool:
        return self.libmpi.exists() and (self.packages / "mpi4py").exists()


def mpi_sites(folder: Path) -> list[MpiSite]:
    """Those under `folder`, or else in this environment."""
    found = []
    for name in LIBMPI:
        sites = [MpiSite(name=name, prefix=prefix.resolve()) for prefix in (folder / name, Path(sys.prefix))]
        found += [site for site in sites if site.exists()][:1]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One contender at one size. Ratios: above 1 is better than what they are to; None where that did not run.

    `written_us` counts the writing of the message too, which is where a message written in place saves its copy.
    `crossing_us`: the all-gather of a header between the same cores, before each repetition.
    """

    call: str
    contender: str
    num_bytes: int
    time_us: float
    time_us_min: float
    time_us_max: float
    written_us: float
    crossing_us: float
    gigabytes_per_s: float
    ratio_to_memcpy: float | None
    ratio_to_best_mpi: float | None
    num_iterations: int
    num_repeats: int


class Ranks:
    """The two processes of one kind of contender."""

    def __init__(self, stack: ExitStack, kind: str, prefix: Sequence[str], settings: dict[str, Any]) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "socket"))
        listener.listen()
        listener.settimeout(ANSWER_TIMEOUT_S)
        settings = {
            **settings,
            "kind": kind,
            "socket": str(folder / "socket"),
            "folder": str(folder),
            "cpus": sorted(os.sched_getaffinity(0)),
        }
        programs = [[*prefix, *_worker(settings)]] if prefix else [_worker(settings | {"rank": r}) for r in (0, 1)]
        for program in programs:
            process = subprocess.Popen(program, stdin=subprocess.DEVNULL)
            stack.callback(_end, process)
        connections = []
        for _ in range(NUM_RANKS):
            connection = stack.enter_context(listener.accept()[0])
            connection.settimeout(ANSWER_TIMEOUT_S)
            files = (stack.enter_context(connection.makefile("r")), stack.enter_context(connection.makefile("w")))
            connections.append((json.loads(files[0].readline()), *files))
        connections.sort(key=lambda connection: int(connection[0]["rank"]))
        self._ranks = [(lines, jobs) for _, lines, jobs in connections]
        self.version: str = connections[0][0]["version"]

    def run(self, call: str, num_bytes: int, num_iterations: int) -> tuple[float, float]:
        """Seconds an iteration, without and with the writing of the message: of the slower rank."""
        job = {"call": call, "num_bytes": num_bytes, "num_iterations": num_iterations, "seed": secrets.randbits(64)}
        for _, jobs in self._ranks:
            jobs.write(json.dumps(job) + "\n")
            jobs.flush()
        exchange_s, written_s = 0.0, 0.0
        for rank, (lines, _) in enumerate(self._ranks):
            line = lines.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
            if "error" in answer:
                raise RuntimeError(f"{call}, rank {rank}, {num_bytes} bytes: {answer['error']}")
            if answer["mismatches"]:
                raise RuntimeError(f"{call}, rank {rank}, {num_bytes} bytes: received other words than were sent")
            exchange_s = max(exchange_s, answer["exchange_ns"] * 1e-9 / num_iterations)
            written_s = max(written_s, (answer["exchange_ns"] + answer["write_ns"]) * 1e-9 / num_iterations)
        return exchange_s, written_s


def _worker(settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "switchgear_bench.transport_worker", json.dumps(settings)]


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def run(
    sizes: Sequence[int], *, num_repeats: int, mailbox_bytes: int, sites: Sequence[MpiSite], gloo: bool = True
) -> tuple[dict[str, str], Iterator[dict[str, Any]]]:
    """The contenders' versions, and a row for every cell."""
    stack = ExitStack()
    with ExitStack() as opening:
        num_bytes_max = max(*sizes, 4096)
        common = {"num_bytes_max": num_bytes_max}
        shm_settings = common | {"channel": f"bench-{secrets.token_hex(8)}", "mailbox_bytes": mailbox_bytes}
        shm = Ranks(opening, "shm", (), shm_settings)
        calls: dict[str, tuple[Ranks, str]] = {
            name: (shm, name) for name in (BASELINE, "shm", "shm held", "shm in place", "shm python")
        }
        gathers: dict[str, tuple[Ranks, str]] = {"shm": (shm, "shm all_gather")}
        versions = {"shm": shm.version}
        for site in sites:
            settings = common | {"packages": str(site.packages), "libmpi": str(site.libmpi)}
            ranks = Ranks(opening, site.name, site.launch, settings)
            calls |= {site.name: (ranks, "native"), f"{site.name} python": (ranks, "python")}
            gathers[site.name] = (ranks, "all_gather")
            versions[site.name] = ranks.version
        if gloo:
            ranks = Ranks(opening, "gloo", (), common)
            calls["gloo python"] = (ranks, "gloo python")
            versions["gloo"] = ranks.version
        stack = opening.pop_all()
    return versions, _measure(stack, calls, gathers, sizes, num_repeats)


def _measure(
    stack: ExitStack,
    calls: dict[str, tuple[Ranks, str]],
    gathers: dict[str, tuple[Ranks, str]],
    sizes: Sequence[int],
    num_repeats: int,
) -> Iterator[dict[str, Any]]:
    header = gathers["shm"]
    rounds = [_Round("all_gather", HEADER_BYTES, gathers, header)]
    rounds += [_Round("all_to_all_v", size, calls, header) for size in sizes]
    with stack:
        for a_round in rounds:
            a_round.warm_up()
        for _ in range(num_repeats):  # outermost, so that a disturbance meets a few repetitions of many cells
            for a_round in rounds:
                a_round.repeat()
    for a_round in rounds:
        yield from a_round.rows()


class _Round:
    """All contenders at one size, in turn."""

    def __init__(
        self, call: str, num_bytes: int, contenders: dict[str, tuple[Ranks, str]], header: tuple[Ranks, str]
    ) -> None:
        self._call = call
        self._num_bytes = num_bytes
        self._contenders = contenders
        self._header = header
        self._crossings_s: list[float] = []
        self._num_iterations: dict[str, int] = {}
        self._times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}

    def warm_up(self) -> None:
        for name, (ranks, call) in self._contenders.items():
            ranks.run(call, self._num_bytes, _ITERATIONS_MIN)  # page faults
            trials = [ranks.run(call, self._num_bytes, 2 * _ITERATIONS_MIN) for _ in range(_TRIALS)]
            written_s = min(written_s for _, written_s in trials)
            self._num_iterations[name] = min(_ITERATIONS_MAX, max(_ITERATIONS_MIN, int(_REPETITION_S / written_s)))

    def repeat(self) -> None:
        ranks, call = self._header
        self._crossings_s.append(ranks.run(call, HEADER_BYTES, _CROSSINGS)[0])
        for name, (ranks, call) in self._contenders.items():
            self._times[name].append(ranks.run(call, self._num_bytes, self._num_iterations[name]))

    def rows(self) -> Iterator[dict[str, Any]]:
        medians = {name: median(exchange_s for exchange_s, _ in found) for name, found in self._times.items()}
        for name, found in self._times.items():
            python = " python" if name.endswith("python") else ""
            mpis = [mpi + python for mpi in LIBMPI if mpi + python in medians]
            best_mpi = min(mpis, key=lambda mpi: medians[mpi], default=None)
            cell = Cell(
                call=self._call,
                contender=name,
                num_bytes=self._num_bytes,
                time_us=medians[name] * 1e6,
                time_us_min=min(found)[0] * 1e6,
                time_us_max=max(found)[0] * 1e6,
                written_us=median(written_s for _, written_s in found) * 1e6,
                crossing_us=median(self._crossings_s) * 1e6,
                gigabytes_per_s=self._num_bytes / medians[name] / 1e9,
                ratio_to_memcpy=self._ratio(BASELINE, name),
                ratio_to_best_mpi=self._ratio(best_mpi, name),
                num_iterations=self._num_iterations[name],
                num_repeats=len(found),
            )
            yield asdict(cell)

    def _ratio(self, reference: str | None, name: str) -> float | None:
        """How many times faster than `reference`: the median over the repetitions."""
        if reference is None or reference not in self._times:
            return None
        pairs = zip(self._times[reference], self._times[name], strict=True)
        return median(theirs_s / ours_s for (theirs_s, _), (ours_s, _) in pairs)
