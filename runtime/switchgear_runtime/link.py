"""The socket between a rank and the server: a mutual challenge-response, then length-prefixed msgpack. No torch.

Handshake (each side proves that it knows the token, which never travels; all fields have fixed lengths):

    rank -> server   magic[4] rank[u32] rank_nonce[32]
    server -> rank   server_nonce[32] HMAC(token, "server" rank rank_nonce server_nonce)[32]
    rank -> server   HMAC(token, "rank" rank rank_nonce server_nonce)[32]
    server -> rank   0x01

Then, both ways: length[u32, little endian] frame, with the length checked before anything is allocated. The link is not
encrypted: it stays on the loopback interface or on the cluster's own network.
"""

from __future__ import annotations

import hmac
import logging
import socket
import struct
import threading
from collections.abc import Callable

from switchgear_runtime.errors import WireError
from switchgear_runtime.messages import FRAME_BYTES_MAX, FromRank, ToRank, decode_to_rank, encode
from switchgear_runtime.system import System

MAGIC = b"SGL1"
NONCE_BYTES = 32
TOKEN_BYTES = 32
GREETING = struct.Struct("<4sI32s")
CHALLENGE_BYTES = NONCE_BYTES + 32
PROOF_BYTES = 32
ACCEPTED = b"\x01"
_LENGTH = struct.Struct("<I")
PREFIX_BYTES = _LENGTH.size
CONNECT_PAUSE_S = 0.05  # before another try at a server that turned this rank away
SEND_TIMEOUT_S = 30  # a server that reads nothing for this long is as good as gone

log = logging.getLogger(__name__)


class LinkRefused(WireError):
    """The other end failed the challenge, or refused this rank."""


class _TurnedAway(LinkRefused):
    """The server hung up before its challenge: it has more guests than it hears at once."""


def server_proof(token: bytes, rank: int, rank_nonce: bytes, server_nonce: bytes) -> bytes:
    return _proof(token, b"server", rank, rank_nonce, server_nonce)


def rank_proof(token: bytes, rank: int, rank_nonce: bytes, server_nonce: bytes) -> bytes:
    return _proof(token, b"rank", rank, rank_nonce, server_nonce)


def _proof(token: bytes, role: bytes, rank: int, rank_nonce: bytes, server_nonce: bytes) -> bytes:
    # The role is in the MAC so that neither side's proof can be played back as the other's.
    return hmac.digest(token, role + b"\0" + _LENGTH.pack(rank) + rank_nonce + server_nonce, "sha256")


def frame(data: bytes) -> bytes:
    """A frame with its prefix, ready for the wire."""
    return _LENGTH.pack(len(data)) + data


def frame_length(prefix: bytes) -> int:
    """The length a prefix announces; WireError when it is over the limit."""
    (length,) = _LENGTH.unpack(prefix)
    if not 0 < length <= FRAME_BYTES_MAX:
        raise WireError(f"a frame announces {length} bytes; it must have 1 to {FRAME_BYTES_MAX}")
    return int(length)


class RankLink:
    """The rank's end. `send` from any thread; one reader thread delivers what arrives."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.rank = rank
        self.own_address: str = connection.getsockname()[0]  # this host's, on the server's network
        self._socket = connection
        self._send_lock = threading.Lock()
        self._closed = False

    @classmethod
    def connect(
        cls, address: tuple[str, int], token: bytes, rank: int, *, timeout_s: float, system: System
    ) -> RankLink:
        """Connect and shake hands. LinkRefused when the server cannot prove the token or refuses this rank.

        Tries again, within `timeout_s`, where strangers crowd the server's door.
        """
        deadline_s = system.now() + timeout_s
        turned_away: _TurnedAway | None = None
        while (left_s := deadline_s - system.now()) > 0 or turned_away is None:
            try:
                return cls._connect(address, token, rank, timeout_s=left_s, system=system)
            except _TurnedAway as error:
                turned_away = error
                system.sleep(CONNECT_PAUSE_S)
            except OSError:
                if turned_away is None:
                    raise
                break
        raise turned_away

    @classmethod
    def _connect(
        cls, address: tuple[str, int], token: bytes, rank: int, *, timeout_s: float, system: System
    ) -> RankLink:
        connection = socket.create_connection(address, timeout=timeout_s)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rank_nonce = system.randbits(8 * NONCE_BYTES).to_bytes(NONCE_BYTES, "little")
            challenge = _ask(connection, GREETING.pack(MAGIC, rank, rank_nonce), address, rank)
            server_nonce, proof = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
            if not hmac.compare_digest(proof, server_proof(token, rank, rank_nonce, server_nonce)):
                raise LinkRefused(f"the server at {address[0]}:{address[1]} does not know this cluster's token")
            connection.sendall(rank_proof(token, rank, rank_nonce, server_nonce))
            if _receive(connection, 1) != ACCEPTED:
                raise LinkRefused(f"the server at {address[0]}:{address[1]} refused rank {rank}")
            connection.settimeout(None)
            set_socket_deadlines(connection)
        except (ConnectionError, EOFError):
            connection.close()
            raise LinkRefused(f"the server at {address[0]}:{address[1]} refused rank {rank}") from None
        except BaseException:
            connection.close()
            raise
        return cls(connection, rank)

    def send(self, message: FromRank) -> None:
        """Send one message; OSError when the link is down or the server stopped reading."""
        data = frame(encode(message))
        with self._send_lock:
            self._socket.sendall(data)

    def start_reader(self, system: System, deliver: Callable[[ToRank], None], on_loss: Callable[[str], None]) -> None:
        """Spawn the reader. `on_loss(reason)` is called once, unless this end called `close()` first."""

        def read() -> None:
            try:
                while True:
                    length = frame_length(_receive(self._socket, PREFIX_BYTES))
                    deliver(decode_to_rank(_receive(self._socket, length)))
            except EOFError:
                reason = "the server closed the link"
            except OSError as error:
                reason = f"the link broke: {error}"
            except WireError as error:
                reason = f"the server sent something malformed: {error}"
            if not self._closed:
                on_loss(reason)

        system.spawn(f"link-{self.rank}", read)

    def close(self) -> None:
        """Idempotent, from any thread."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the link of rank %d was already down", self.rank)
        self._socket.close()


def _ask(connection: socket.socket, greeting: bytes, address: tuple[str, int], rank: int) -> bytes:
    """The server's challenge."""
    try:
        connection.sendall(greeting)
        first = _receive(connection, 1)
    except (ConnectionError, EOFError):
        raise _TurnedAway(f"the server at {address[0]}:{address[1]} refused rank {rank} unheard") from None
    return first + _receive(connection, CHALLENGE_BYTES - 1)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly `num_bytes`; EOFError when the peer closes before. Memory grows with what arrives, not with what was
    announced."""
    parts: list[bytes] = []
    missing = num_bytes
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def set_socket_deadlines(connection: socket.socket) -> None:
    """A dead host at the other end becomes an error within half a minute; without this, a half-open link waits for
    ever."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_TIMEOUT_S * 1000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT_S, 0))
