"""LinkServer: who gets in, what a malformed frame does, and how a link ends; with RankLink at the other end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import Queue

import pytest

from switchgear import link_server, link_writer
from switchgear.link_server import LinkServer
from switchgear_runtime import link
from switchgear_runtime.link import LinkRefused, RankLink
from switchgear_runtime.messages import Abort, FromRank, Parked, Stopped, encode
from switchgear_runtime.system import RealSystem

SYSTEM = RealSystem(seed=2)


class Host:
    """A link server and what it reported."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, FromRank]] = []
        self.lost: list[tuple[int, str]] = []
        self.malformed: list[tuple[int, str]] = []
        self.links: list[RankLink] = []
        self.server = LinkServer(
            system=SYSTEM,
            on_message=lambda rank, message: self.messages.append((rank, message)),
            on_lost=lambda rank, reason: self.lost.append((rank, reason)),
            on_malformed=lambda rank, reason: self.malformed.append((rank, reason)),
        )
        self.address = ("", 0)

    async def connect(self, rank: int, token: bytes) -> RankLink:
        connected = await asyncio.to_thread(RankLink.connect, self.address, token, rank, timeout_s=5, system=SYSTEM)
        self.links.append(connected)
        return connected


def hosted(scenario: Callable[[Host], Awaitable[None]]) -> Host:
    async def run() -> Host:
        host = Host()
        host.address = await host.server.start("127.0.0.1")
        try:
            await asyncio.wait_for(scenario(host), 20)
        finally:
            await host.server.close()
            for connected in host.links:
                connected.close()
        return host

    return asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within 5 s")


def test_messages_cross_both_ways() -> None:
    async def scenario(host: Host) -> None:
        rank = await host.connect(1, host.server.expect(1))
        delivered: Queue[object] = Queue()
        rank.start_reader(SYSTEM, delivered.put, lambda _: None)
        rank.send(Parked(1, 2, 3))
        host.server.send(1, Abort(5))
        host.server.send(0, Abort(6))  # no such link: dropped
        assert await asyncio.to_thread(delivered.get, timeout=5) == Abort(5)
        await until(lambda: host.messages)
        assert delivered.empty()

    assert hosted(scenario).messages == [(1, Parked(1, 2, 3))]


@pytest.mark.parametrize("case", ["wrong token", "wrong rank", "used token", "withdrawn token"])
def test_strangers_are_refused(case: str) -> None:
    async def scenario(host: Host) -> None:
        token = host.server.expect(1)
        rank = 1
        if case == "wrong token":
            token = bytes(32)
        elif case == "wrong rank":
            rank = 2
        elif case == "used token":
            await host.connect(1, token)
        else:
            host.server.expect(1)
        with pytest.raises(LinkRefused):
            await host.connect(rank, token)

    host = hosted(scenario)
    assert host.messages == host.malformed == []


def test_guest_that_skips_the_proof_of_the_server_still_needs_its_own() -> None:
    async def scenario(host: Host) -> None:
        host.server.expect(1)
        reader, writer = await asyncio.open_connection(*host.address)
        writer.write(link.GREETING.pack(link.MAGIC, 1, b"n" * 32))
        challenge = await reader.readexactly(link.CHALLENGE_BYTES)
        writer.write(challenge[link.NONCE_BYTES :])  # the server's own proof, played back
        assert await reader.read() == b""
        writer.close()

    assert hosted(scenario).messages == []


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_handshake_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_server, "HANDSHAKE_TIMEOUT_S", 0.2)

    async def scenario(host: Host) -> None:
        silent = socket.create_connection(host.address, timeout=5)
        assert await asyncio.to_thread(hung_up, silent)
        silent.close()

    hosted(scenario)


def test_silent_strangers_keep_no_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest makes room: of three silent connections, at two places, and a rank, the rank and the latest stay."""
    monkeypatch.setattr(link_server, "HANDSHAKES_MAX", 2)

    async def scenario(host: Host) -> None:
        token = host.server.expect(0)
        silent = [socket.create_connection(host.address, timeout=5) for _ in range(3)]
        (await host.connect(0, token)).send(Stopped(0))
        await until(lambda: host.messages)
        for connection in silent[:2]:
            assert await asyncio.to_thread(hung_up, connection)
        silent[2].settimeout(0.05)
        with pytest.raises(TimeoutError):
            silent[2].recv(1)
        for connection in silent:
            connection.close()

    assert hosted(scenario).lost == []


def test_rank_turned_away_tries_again() -> None:
    """A crowd pushes each connection out before it is heard, for a while."""

    async def scenario(host: Host) -> None:
        token = host.server.expect(0)
        admit, num_refused = host.server._admit, 0

        async def crowded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
            nonlocal num_refused
            num_refused += 1
            return await admit(reader, writer) if num_refused > 3 else None

        host.server._admit = crowded  # type: ignore[method-assign]
        await host.connect(0, token)

    hosted(scenario)


def test_noise_is_refused_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(host: Host) -> None:
        for noise in (b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n", b"SGL1", b""):
            with socket.create_connection(host.address, timeout=5) as connection:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    while await asyncio.to_thread(connection.recv, 100):
                        pass

    host = hosted(scenario)
    assert host.lost == host.malformed == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xff\xff\xff" + b"x" * 1000, "announces 4294967295 bytes"),
        (link.frame(b"\xc1"), "not a valid msgpack frame"),
        (link.frame(encode(Abort(1))), "breaks the schema"),
        (link.frame(encode(Parked(2, 1, 1))), "the link of rank 1 carries a Parked of rank 2"),
    ],
)
def test_malformed_frame_blames_the_rank(data: bytes, reason: str) -> None:
    async def scenario(host: Host) -> None:
        rank = await host.connect(1, host.server.expect(1))
        rank.send(Stopped(1))
        rank._socket.sendall(data)
        await until(lambda: host.malformed)

    host = hosted(scenario)
    assert len(host.messages) == 1
    assert host.malformed[0][0] == 1
    assert reason in host.malformed[0][1]
    assert host.lost == []


def test_lost_once_and_not_after_drop() -> None:
    async def scenario(host: Host) -> None:
        first = await host.connect(0, host.server.expect(0))
        second = await host.connect(1, host.server.expect(1))
        first.close()
        await until(lambda: host.lost)
        host.server.drop(1)
        ended: Queue[str] = Queue()
        second.start_reader(SYSTEM, lambda _: None, ended.put)
        assert await asyncio.to_thread(ended.get, timeout=5)

    host = hosted(scenario)
    assert host.lost == [(0, "the process closed it")]


def test_rank_that_does_not_read_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_writer, "UNREAD_TIMEOUT_S", 0.3)

    async def scenario(host: Host) -> None:
        await host.connect(0, host.server.expect(0))
        for _ in range(64):
            host.server.send(0, link_server_message(256 << 10))
        await until(lambda: host.malformed)
        await asyncio.sleep(0.4)  # and no more after that

    host = hosted(scenario)
    assert [rank for rank, _ in host.malformed] == [0]
    assert "does not read its link" in host.malformed[0][1]
    assert host.lost == []


def test_rank_that_reads_slowly_may_lag_by_any_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 MB at once, taken in pieces with pauses: slow is not stuck."""
    monkeypatch.setattr(link_writer, "UNREAD_TIMEOUT_S", 0.5)

    async def scenario(host: Host) -> None:
        rank = await host.connect(0, host.server.expect(0))
        message = link_server_message(4 << 20)
        for _ in range(20):
            host.server.send(0, message)
        missing = 20 * len(link.frame(encode(message)))  # type: ignore[arg-type]
        while missing:
            missing -= len(await asyncio.to_thread(rank._socket.recv, min(missing, 8 << 20), socket.MSG_WAITALL))
            await asyncio.sleep(0.1)

    host = hosted(scenario)
    assert host.malformed == host.lost == []


def link_server_message(num_bytes: int) -> object:
    from switchgear_runtime.messages import EndGeneration

    return EndGeneration(1, 1, "x" * num_bytes)
