"""RankLink: the rank's end of the handshake and of the frames, against a server written out by hand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue

import pytest

from switchgear_runtime import link
from switchgear_runtime.errors import WireError
from switchgear_runtime.link import LinkRefused, RankLink
from switchgear_runtime.messages import FRAME_BYTES_MAX, Abort, Rejected, Stopped, Wake, decode_from_rank, encode
from switchgear_runtime.system import RealSystem

SYSTEM = RealSystem(seed=1)
TOKEN = bytes(range(32))
NONCE = b"n" * 32


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """One connection, handled by `serve` on a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            thread.join(10)
            assert not thread.is_alive()


def take(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        assert part, "the rank closed the link"
        data += part
    return data


def admit(connection: socket.socket, token: bytes = TOKEN) -> None:
    magic, rank, nonce = link.GREETING.unpack(take(connection, link.GREETING.size))
    assert magic == link.MAGIC
    connection.sendall(NONCE + link.server_proof(token, rank, nonce, NONCE))
    assert take(connection, 32) == link.rank_proof(token, rank, nonce, NONCE)
    connection.sendall(link.ACCEPTED)


def connect(address: tuple[str, int], timeout_s: float = 5) -> RankLink:
    return RankLink.connect(address, TOKEN, 3, timeout_s=timeout_s, system=SYSTEM)


class Reader:
    """What a link's reader thread delivers."""

    def __init__(self, rank_link: RankLink) -> None:
        self.messages: Queue[object] = Queue()
        self.losses: Queue[str] = Queue()
        rank_link.start_reader(SYSTEM, self.messages.put, self.losses.put)


def test_messages_cross_both_ways() -> None:
    def serve(connection: socket.socket) -> None:
        admit(connection)
        connection.sendall(link.frame(encode(Wake(4, 7))) + link.frame(encode(Abort(9))))
        length = link.frame_length(take(connection, 4))
        assert decode_from_rank(take(connection, length)) == Stopped(3)

    with server(serve) as address:
        rank_link = connect(address)
        reader = Reader(rank_link)
        assert reader.messages.get(timeout=5) == Wake(4, 7)
        assert reader.messages.get(timeout=5) == Abort(9)
        rank_link.send(Stopped(3))
        assert reader.losses.get(timeout=5) == "the server closed the link"
        rank_link.close()


def test_frames_split_at_every_byte_arrive_whole() -> None:
    data = link.frame(encode(Wake(1, 2)))

    def serve(connection: socket.socket) -> None:
        admit(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data:
            connection.sendall(bytes([byte]))

    with server(serve) as address:
        rank_link = connect(address)
        assert Reader(rank_link).messages.get(timeout=5) == Wake(1, 2)
        rank_link.close()


def test_closing_is_no_loss() -> None:
    with server(lambda connection: (admit(connection), connection.recv(1))) as address:
        rank_link = connect(address)
        reader = Reader(rank_link)
        rank_link.close()
        rank_link.close()
    assert reader.losses.empty()


def test_server_without_the_token_is_refused_and_gets_no_proof() -> None:
    after: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        _, rank, nonce = link.GREETING.unpack(take(connection, link.GREETING.size))
        connection.sendall(NONCE + link.server_proof(b"?" * 32, rank, nonce, NONCE))
        after.append(connection.recv(100))

    with server(serve) as address, pytest.raises(LinkRefused, match="does not know this cluster's token"):
        connect(address)
    assert after == [b""]


def test_a_proof_cannot_be_played_back() -> None:
    """A stranger without the token answers with what the rank itself would prove."""

    def serve(connection: socket.socket) -> None:
        _, rank, nonce = link.GREETING.unpack(take(connection, link.GREETING.size))
        connection.sendall(NONCE + link.rank_proof(TOKEN, rank, nonce, NONCE))
        connection.recv(100)

    with server(serve) as address, pytest.raises(LinkRefused, match="does not know"):
        connect(address)


@pytest.mark.parametrize("num_bytes", [0, 1, 63])
def test_handshake_that_breaks_off_is_refused(num_bytes: int) -> None:
    def serve(connection: socket.socket) -> None:
        take(connection, link.GREETING.size)
        connection.sendall(b"x" * num_bytes)

    with server(serve) as address, pytest.raises(LinkRefused, match="refused rank 3"):
        connect(address, timeout_s=0.3)  # unheard, it would try again for so long


def test_silent_server_meets_a_deadline() -> None:
    def serve(connection: socket.socket) -> None:
        take(connection, link.GREETING.size)
        connection.recv(100)

    with server(serve) as address, pytest.raises(TimeoutError):
        RankLink.connect(address, TOKEN, 3, timeout_s=0.2, system=SYSTEM)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xff\xff\xff", "a frame announces 4294967295 bytes"),
        (b"\0\0\0\0", "a frame announces 0 bytes"),
        ((FRAME_BYTES_MAX + 1).to_bytes(4, "little"), "a frame announces 16777217 bytes"),
        (link.frame(b"\xc1"), "not a valid msgpack frame"),
        (link.frame(encode(Stopped(1))), "frame breaks the schema"),
        (link.frame(b"\xd4\x01\x00"), "not a valid msgpack frame"),
    ],
)
def test_malformed_frame_is_a_loss_with_its_reason(data: bytes, reason: str) -> None:
    def serve(connection: socket.socket) -> None:
        admit(connection)
        connection.sendall(data)
        connection.recv(1)

    with server(serve) as address:
        rank_link = connect(address)
        lost = Reader(rank_link).losses.get(timeout=5)
        assert reason in lost
        rank_link.close()


def test_oversize_message_is_not_sent() -> None:
    with server(lambda connection: (admit(connection), connection.recv(1))) as address:
        rank_link = connect(address)
        huge = Rejected(0, 0, "x" * (FRAME_BYTES_MAX + 1))
        with pytest.raises(WireError, match="a frame holds at most"):
            rank_link.send(huge)
        rank_link.close()
