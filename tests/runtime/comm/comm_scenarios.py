"""What the ranks of the transport tests do, the same over every transport; and the program of a rank process.

A scenario is a function of (transport, tell, **arguments): it asserts, and returns something JSON can hold.
`tell(text)` reports a moment to the test. As a program (`python comm_scenarios.py`) this reads one JSON job a line and
answers in kind; with `--fork`, each line it reads is a Unix socket's path, for a forked child to serve; `--connect`: a rank of an MPI job.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from domain_scenarios import inside_storm, moe_layers

from switchgear_runtime.comm.network import Network
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.comm.shm import ShmTransport
from switchgear_runtime.comm.transport import HEADER_BYTES_MAX, Transport
from switchgear_runtime.errors import TransportError
from switchgear_runtime.generation import GenerationDescriptor

Tell = Callable[[str], None]
TIMEOUT_S = 30.0
LOCAL = "127.0.0.1"


def content(seed: int, call: int, src: int, dst: int, num_bytes: int) -> bytes:
    return random.Random(f"{seed} {call} {src} {dst}").randbytes(num_bytes)


def draw_lengths(rng: random.Random, world_size: int, mailbox_bytes: int, shape: str) -> list[list[int]]:
    """lengths[src][dst] of one call, the same at every rank."""
    ranks = range(world_size)
    if shape == "empty":
        return [[0] * world_size for _ in ranks]
    if shape == "one_talks":
        talker = rng.randrange(world_size)
        return [[rng.randrange(mailbox_bytes) if src == talker else 0 for _ in ranks] for src in ranks]
    if shape == "one_hears":
        hearer = rng.randrange(world_size)
        return [[rng.randrange(mailbox_bytes) if dst == hearer else 0 for dst in ranks] for _ in ranks]
    if shape == "borders":
        borders = [0, 1, 63, 64, 65, mailbox_bytes - 1, mailbox_bytes, mailbox_bytes + 1, 2 * mailbox_bytes]
        return [[rng.choice(borders) for _ in ranks] for _ in ranks]
    if shape == "long":
        return [[rng.randrange(mailbox_bytes, 9 * mailbox_bytes) for _ in ranks] for _ in ranks]
    return [[rng.choice((0, rng.randrange(64), rng.randrange(3 * mailbox_bytes))) for _ in ranks] for _ in ranks]


def exchange(
    transport: Transport,
    _: Tell,
    *,
    seed: int,
    num_calls: int,
    mailbox_bytes: int,
    shapes: list[str],
    jitter_s: float,
) -> dict[str, int]:
    """Random all_to_all_v with all_gather and barrier between; every byte is checked, again after the next call."""
    rank, ranks = transport.rank, range(transport.world_size)
    rng, own_rng = random.Random(seed), random.Random(seed * 1000 + rank)
    before = transport.stats()
    sent = received = calls = 0
    previous: list[memoryview] = []
    previous_expected: list[bytes] = []
    for call in range(num_calls):
        lengths = draw_lengths(rng, transport.world_size, mailbox_bytes, rng.choice(shapes))
        send = [content(seed, call, rank, dst, lengths[rank][dst]) for dst in ranks]
        expected = [content(seed, call, src, rank, lengths[src][rank]) for src in ranks]
        time.sleep(own_rng.choice((0.0, own_rng.random() * jitter_s)))
        messages = [own_rng.choice((bytes, memoryview, lambda m: memoryview(bytearray(m))))(m) for m in send]
        views = transport.all_to_all_v(messages, timeout_s=TIMEOUT_S)
        assert [bytes(view) for view in views] == expected, f"call {call}"
        assert all(view.readonly and view.format == "B" and view.ndim == 1 for view in views)
        assert [bytes(view) for view in previous] == previous_expected, f"views of call {call - 1}, after call {call}"
        previous, previous_expected = views, expected
        sent += sum(lengths[rank][peer] for peer in ranks if peer != rank)
        received += sum(lengths[peer][rank] for peer in ranks if peer != rank)
        calls += 1
        if rng.random() < 0.3:
            headers = [rng.randbytes(rng.choice((0, 1, 40, HEADER_BYTES_MAX))) for _ in ranks]
            assert transport.all_gather(headers[rank], timeout_s=TIMEOUT_S) == headers, f"header after call {call}"
            sent += len(headers[rank]) * (len(ranks) - 1)
            received += sum(map(len, headers)) - len(headers[rank])
            calls += 1
        if rng.random() < 0.1:
            transport.barrier(timeout_s=TIMEOUT_S)
            calls += 1
    after = transport.stats()
    counted = (
        after.num_calls - before.num_calls,
        after.sent_bytes - before.sent_bytes,
        after.received_bytes - before.received_bytes,
    )
    assert counted == (calls, sent, received)
    return {"sent_bytes": sent, "received_bytes": received}


def headers(transport: Transport, _: Tell, *, seed: int, num_calls: int) -> None:
    rng = random.Random(seed)
    for _ in range(num_calls):
        given = [rng.randbytes(rng.randrange(HEADER_BYTES_MAX + 1)) for _ in range(transport.world_size)]
        assert transport.all_gather(given[transport.rank], timeout_s=TIMEOUT_S) == given


def barriers(transport: Transport, _: Tell, *, seed: int, num_calls: int) -> list[tuple[float, float]]:
    rng = random.Random(seed * 1000 + transport.rank)
    times = []
    for _ in range(num_calls):
        time.sleep(rng.random() * 0.005)
        entered = time.monotonic()
        transport.barrier(timeout_s=TIMEOUT_S)
        times.append((entered, time.monotonic()))
    return times


def addresses(transport: Transport, _: Tell) -> None:
    """Peers' views start at multiples of 64 bytes, short and long; what a rank sends itself is not copied."""
    import numpy as np

    for num_bytes in (1, 64, 100, 5000, 50_000):
        own = memoryview(bytearray(num_bytes))
        views = transport.all_to_all_v([own] * transport.world_size, timeout_s=TIMEOUT_S)
        starts = [np.frombuffer(view, np.uint8).ctypes.data for view in views]
        assert starts[transport.rank] == np.frombuffer(own, np.uint8).ctypes.data
        assert all(start % 64 == 0 for peer, start in enumerate(starts) if peer != transport.rank)


def shaped(transport: Transport, _: Tell) -> None:
    """Messages need not be flat bytes: what counts is their memory."""
    from array import array

    numbers = memoryview(array("d", range(60))).cast("B").cast("d", (5, 12))
    views = transport.all_to_all_v([numbers] * transport.world_size, timeout_s=TIMEOUT_S)
    assert all(bytes(view) == numbers.tobytes() for view in views)


def arguments(transport: Transport, _: Tell) -> None:
    """A mistaken argument is refused before anything is sent, and the transport lives on."""
    for attempt in (
        lambda: transport.all_gather(b"x" * (HEADER_BYTES_MAX + 1), timeout_s=1),
        lambda: transport.all_to_all_v([b""] * (transport.world_size + 1), timeout_s=1),
    ):
        try:
            attempt()
        except ValueError:
            continue
        raise AssertionError("a mistaken argument was accepted")
    transport.barrier(timeout_s=TIMEOUT_S)


def suffer(
    transport: Transport, tell: Tell, *, victim: int, call: str, timeout_s: float, num_calls: int
) -> dict[str, Any]:
    """After `num_calls` exchanges the victim says so and comes no more; what the others then see."""
    rank, world_size = transport.rank, transport.world_size
    for number in range(num_calls):
        transport.all_to_all_v([bytes([number % 256]) * 3000] * world_size, timeout_s=TIMEOUT_S)
    if rank == victim:
        tell("ready")
        return {}
    begin = time.monotonic()
    try:
        while True:  # until the victim is gone, should it be still there
            _any_call(transport, call, timeout_s)
    except TransportError as first:
        elapsed_s = time.monotonic() - begin
        error = first
    begin = time.monotonic()
    for other_call in ("all_gather", "all_to_all_v", "barrier"):
        try:
            _any_call(transport, other_call, timeout_s)
        except TransportError as again:
            assert type(again) is type(error) and again.peers == error.peers, again
        else:
            raise AssertionError(f"{other_call} passed after {error!r}")
    assert time.monotonic() - begin < timeout_s / 2, "a dead transport must raise at once"
    return {"error": type(error).__name__, "peers": error.peers, "text": str(error), "elapsed_s": elapsed_s}


def storm(transport: Transport, tell: Tell, *, victim: int, mailbox_bytes: int) -> dict[str, Any]:
    """Exchanges without pause, short and long, until something breaks."""
    messages = [bytes(length) for length in (0, 100, mailbox_bytes, 5 * mailbox_bytes)]
    try:
        for number in range(10**9):
            if number == 20 and transport.rank == victim:
                tell("ready")
            send = [messages[(number + peer) % len(messages)] for peer in range(transport.world_size)]
            transport.all_to_all_v(send, timeout_s=TIMEOUT_S)
            transport.all_gather(b"header", timeout_s=TIMEOUT_S)
    except TransportError as error:
        return {"error": type(error).__name__, "peers": error.peers, "text": str(error)}
    raise AssertionError("unreachable")


def aborted(transport: Transport, _: Tell, *, by_thread: bool) -> dict[str, Any]:
    """All wait for the last rank, until rank 0 aborts: from another thread, or (alone) from its own."""
    last = transport.world_size - 1
    if transport.rank == 0 and by_thread:
        threading.Timer(0.1, lambda: transport.abort("enough")).start()
    elif transport.rank == 0:
        transport.abort("enough")
    if transport.rank == last and last > 0:
        time.sleep(0.3)
    begin = time.monotonic()
    try:
        while True:  # a single rank never waits, so it calls until the abort
            _any_call(transport, "barrier", TIMEOUT_S)
    except TransportError as error:
        transport.abort("again")
        return {
            "error": type(error).__name__,
            "peers": error.peers,
            "text": str(error),
            "elapsed_s": time.monotonic() - begin,
        }


def device_exchange(transport: Transport, _: Tell, *, seed: int, device: str) -> int:
    """Of memory on a device; returns how many bytes crossed."""
    from device_messages import exchange_and_check

    from switchgear_runtime.comm.device_exchange import device_exchange as over

    return exchange_and_check(over(transport), transport.rank, transport.world_size, seed, device)


def closing(transport: Transport, _: Tell) -> dict[str, Any]:
    """Rank 0 closes under its own pending call, from a thread; the last rank never comes, so only that ends it."""
    if transport.rank == transport.world_size - 1:
        time.sleep(0.2)
        transport.close()
    elif transport.rank == 0:
        threading.Timer(0.05, transport.close).start()
    view = None
    try:
        while True:
            view = transport.all_to_all_v([b"kept"] * transport.world_size, timeout_s=TIMEOUT_S)[-1]
    except TransportError as error:
        transport.close()
        transport.close()
        transport.abort("no effect")
        stats = transport.stats()
        return {"error": type(error).__name__, "peers": error.peers, "num_calls": stats.num_calls, "last": str(view)}


def _any_call(transport: Transport, call: str, timeout_s: float) -> None:
    if call == "all_gather":
        transport.all_gather(b"late", timeout_s=timeout_s)
    elif call == "all_to_all_v":
        transport.all_to_all_v([b"late"] * transport.world_size, timeout_s=timeout_s)
    elif call == "long":
        transport.all_to_all_v([bytes(200_000)] * transport.world_size, timeout_s=timeout_s)
    else:
        transport.barrier(timeout_s=timeout_s)


SCENARIOS: dict[str, Callable[..., Any]] = {
    run.__name__: run
    for run in (
        exchange,
        headers,
        barriers,
        addresses,
        shaped,
        arguments,
        suffer,
        storm,
        aborted,
        closing,
        device_exchange,
        inside_storm,
        moe_layers,
    )
}


def outcome(run: Callable[[], Any]) -> dict[str, Any]:
    """The result of `run`, or its error, as JSON can hold it."""
    try:
        return {"result": run()}
    except TransportError as error:
        return {"error": type(error).__name__, "peers": list(error.peers), "text": str(error)}
    except Exception as error:  # noqa: BLE001 - the test reports it
        return {"error": type(error).__name__, "peers": [], "text": str(error)}


class FolderStore:
    """A `KeyValueStore` of files, for ranks without a server."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(exist_ok=True, parents=True)

    def put(self, key: str, value: bytes) -> None:
        draft = self._folder / f"draft-{os.getpid()}-{threading.get_ident()}"
        draft.write_bytes(value)
        draft.rename(self._path(key))  # whole, or not there

    def get(self, keys: Sequence[str], *, timeout_s: float) -> dict[str, bytes]:
        deadline = time.monotonic() + timeout_s
        while True:
            found = {key: self._path(key).read_bytes() for key in keys if self._path(key).exists()}
            if len(found) == len(keys) or time.monotonic() >= deadline:
                return found
            time.sleep(0.001)

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")


def _network(job: dict[str, Any], channel: str) -> Network:
    address = job["address"]
    return Network(store=FolderStore(f"{job['folder']}/{channel}"), address=address, trusted=address != LOCAL)


def _open(job: dict[str, Any], channel: str) -> Transport:
    kind, rank, world_size = job["transport"], job["rank"], job["world_size"]
    if kind == "shm":
        return ShmTransport(channel, rank, world_size, job["mailbox_bytes"], job["join_timeout_s"])
    return open_transport(
        {"hierarchical": "auto"}.get(kind, kind),
        GenerationDescriptor(
            term=1, generation=1, world_size=world_size, epoch=0, channel=channel, hosts=tuple(job.get("hosts", ()))
        ),
        rank,
        mailbox_bytes=job["mailbox_bytes"],
        timeout_s=job["join_timeout_s"],
        network=_network(job, channel) if "folder" in job else None,
        device=job.get("device", "cpu"),
        dispatch=job.get("dispatch", "flat"),
    )


def _serve(lines: Iterable[str], out: IO[str], **facts: Any) -> None:
    """One job a line: join `channels` (a transport each, used in turn), run the scenario, answer, stay if asked to."""

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def do(job: dict[str, Any]) -> list[Any]:
        transports: list[Transport] = []
        try:
            for channel in job["channels"]:
                transports.append(_open(job, channel))  # noqa: PERF401 - those that opened are closed when the next does not
            scenario = SCENARIOS[job["scenario"]]
            results = [
                scenario(transport, lambda text: answer({"told": text}), **job["arguments"])
                for _ in range(job["num_rounds"])
                for transport in transports
            ]
            if job["stay"]:
                time.sleep(3600)
            return results
        finally:
            for transport in transports:
                transport.close()

    answer({"told": "up", "pid": os.getpid(), **facts})
    for line in lines:
        job = json.loads(line)
        assert job["transport"] != "shm" or "torch" not in sys.modules
        answer(outcome(lambda job=job: do(job)))


def serve_socket(path: str, **facts: Any) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("r") as lines, connection.makefile("w") as out:
            _serve(lines, out, **facts)


def _fork() -> None:
    """Pay for the import of torch once."""
    import switchgear_runtime.comm.gloo  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            serve_socket(line.rstrip("\n"))
            os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fork"]:
        _fork()
    elif sys.argv[1:2] == ["--connect"]:
        from switchgear_runtime.comm.mpi import load_mpi

        serve_socket(sys.argv[2], rank=load_mpi().COMM_WORLD.rank)
    else:
        _serve(sys.stdin, sys.stdout)
