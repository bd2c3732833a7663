"""Experts over TCP, from the rank that computes with them to the rank that will: `PeerChannel`. Pull only.

Each rank listens for one generation, on the address at which it reaches the server, and leaves port and token in the
generation's store, which only its ranks can read. Whoever connects proves the token and makes the other end prove it,
as on the link (link.py). Then, as often as wanted:

    puller -> source   MoE layer[u32] expert[u32] sha256[32]: of the file of its weights; zeros: the checkpoint's
    source -> puller   1 or 0: whether it computes with these; if so gate and up, then down: their packed bytes

The source reads weights that a step only reads too, and immutable ones, so nobody waits for anybody.
"""

from __future__ import annotations

import hmac
import logging
import socket
import struct
import threading
from collections.abc import Callable

import msgspec

from switchgear_runtime.comm.network import is_loopback
from switchgear_runtime.comm.store import KeyValueStore
from switchgear_runtime.errors import PeerLost, TransportAborted, TransportError, TransportTimeout
from switchgear_runtime.link import (
    CHALLENGE_BYTES,
    GREETING,
    NONCE_BYTES,
    PROOF_BYTES,
    TOKEN_BYTES,
    rank_proof,
    server_proof,
    set_socket_deadlines,
)
from switchgear_runtime.migration.pace import Pace, StagingCancelled
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.system import System

MAGIC = b"SGX2"
PIECE_BYTES = 256 << 10
_REQUEST = struct.Struct("<II32s")
_NO_FILE = bytes(32)
_LOOK_S = 0.2  # for a cancelled job, while a peer's address is awaited
_HANDSHAKE_S = 5.0  # of a guest, in all
_ACCEPT_PAUSE_S = 0.5  # when the process has no descriptor left for a guest

log = logging.getLogger(__name__)


class _Address(msgspec.Struct, frozen=True):
    host: str
    port: int
    token: bytes


class PeerChannel:
    """One rank's end, for one generation. `fetch` from one thread; `close` from any. `at_thread_start` runs in each
    thread that serves."""

    def __init__(
        self,
        runner: ModelRunner,
        store: KeyValueStore,
        *,
        rank: int,
        world_size: int,
        address: str,
        timeout_s: float,
        system: System,
        at_thread_start: Callable[[], None] | None = None,
    ) -> None:
        self._runner = runner
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._system = system
        self._at_thread_start = at_thread_start
        self._token = self._nonce(TOKEN_BYTES)
        self._lock = threading.Lock()
        self._is_closed = False
        self._sockets: set[socket.socket] = set()  # to end whoever waits in one
        self._sources: dict[int, socket.socket] = {}
        self._num_guests = 0
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=world_size)
        self._keep(listener)
        host, port = listener.getsockname()[:2]
        store.put(_key(rank), msgspec.msgpack.encode(_Address(host, port, self._token)))
        system.spawn(f"experts-{rank}", lambda: self._accept(listener))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            _shut(one)

    # --- the puller -------------------------------------------------------------------------------------------------

    def fetch(
        self,
        source: int,
        moe_layer: int,
        expert: int,
        out: tuple[memoryview, memoryview],
        pace: Pace,
        sha256: str = "",
    ) -> None:
        try:
            connection = self._connection(source, pace)
            connection.sendall(_REQUEST.pack(moe_layer, expert, bytes.fromhex(sha256) or _NO_FILE))
            if _receive(connection, 1) != b"\x01":
                text = f"rank {source} does not compute with expert {expert} of MoE layer {moe_layer}"
                text += f" as the file with sha256 {sha256} has it" * bool(sha256)
                raise TransportError(text, rank=self._rank, peers=(source,))
            for part in out:
                for start in range(0, len(part), PIECE_BYTES):
                    piece = part[start : start + PIECE_BYTES]
                    _receive_into(connection, piece)
                    pace(len(piece))
        except (OSError, EOFError) as error:
            self._forget(source)
            raise self._blame(source, error) from None
        except StagingCancelled:
            self._forget(source)  # the rest of the answer is still on its way
            raise

    def _connection(self, source: int, pace: Pace) -> socket.socket:
        connection = self._sources.get(source)
        if connection is None:
            address = self._address(source, pace)
            connection = socket.create_connection((address.host, address.port), timeout=self._timeout_s)
            self._keep(connection)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._prove(connection, source, address.token)
            self._sources[source] = connection
        return connection

    def _address(self, source: int, pace: Pace) -> _Address:
        deadline_s = self._system.now() + self._timeout_s
        while self._system.now() < deadline_s:
            if pace.cancelled:
                raise StagingCancelled
            found = self._store.get([_key(source)], timeout_s=_LOOK_S)
            if found:
                return msgspec.msgpack.decode(found[_key(source)], type=_Address)
        text = f"rank {self._rank}: waited {self._timeout_s:g} s for the address of rank {source}'s experts"
        raise TransportTimeout(text, rank=self._rank, peers=(source,))

    def _prove(self, connection: socket.socket, source: int, token: bytes) -> None:
        nonce = self._nonce(NONCE_BYTES)
        connection.sendall(GREETING.pack(MAGIC, self._rank, nonce))
        challenge = _receive(connection, CHALLENGE_BYTES)
        theirs, proof = challenge[:NONCE_BYTES], challenge[NONCE_BYTES:]
        if not hmac.compare_digest(proof, server_proof(token, self._rank, nonce, theirs)):
            text = f"whoever listens in place of rank {source} does not know its token"
            raise TransportError(text, rank=self._rank, peers=(source,))
        connection.sendall(rank_proof(token, self._rank, nonce, theirs))

    def _blame(self, source: int, error: Exception) -> TransportError:
        if self._is_closed:
            return TransportAborted("the generation is over", rank=self._rank)
        if isinstance(error, TimeoutError):
            text = f"waited {self._timeout_s:g} s for experts of rank {source}"
            return TransportTimeout(text, rank=self._rank, peers=(source,))
        return PeerLost(f"rank {source} gives no experts: {error or 'it closed'}", rank=self._rank, peers=(source,))

    def _forget(self, source: int) -> None:
        connection = self._sources.pop(source, None)
        if connection is not None:
            with self._lock:
                self._sockets.discard(connection)
            _shut(connection)

    # --- the source -------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self._is_closed:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if not self._is_closed:
                    log.warning("rank %d cannot hear who asks for experts: %s", self._rank, error)
                    self._system.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._num_guests >= 2 * self._world_size:  # a peer has one connection; the rest is for strangers
                _shut(connection)
                continue
            try:
                self._keep(connection)
            except ConnectionAbortedError:
                return
            with self._lock:
                self._num_guests += 1
            self._system.spawn(f"experts-{self._rank}-out", lambda connection=connection: self._serve(connection))  # type: ignore[misc]

    def _serve(self, connection: socket.socket) -> None:
        if self._at_thread_start is not None:
            self._at_thread_start()
        try:
            puller = self._admit(connection)
            if puller is None:
                return
            connection.settimeout(None)  # the puller asks when it likes; the kernel notices a dead host
            set_socket_deadlines(connection)
            while True:
                held = self._held(*_REQUEST.unpack(_receive(connection, _REQUEST.size)))
                connection.sendall(b"\0" if held is None else b"\1")
                for part in held or ():
                    connection.sendall(part)
        except (OSError, EOFError) as error:
            log.debug("rank %d: a connection for experts ended: %s", self._rank, error or "closed")
        finally:
            with self._lock:
                self._sockets.discard(connection)
                self._num_guests -= 1
            _shut(connection)

    def _admit(self, connection: socket.socket) -> int | None:
        deadline_s = self._system.now() + _HANDSHAKE_S
        magic, rank, nonce = GREETING.unpack(self._hear(connection, GREETING.size, deadline_s))
        mine = self._nonce(NONCE_BYTES)
        connection.sendall(mine + server_proof(self._token, rank, nonce, mine))
        proof = self._hear(connection, PROOF_BYTES, deadline_s)
        if magic != MAGIC or not hmac.compare_digest(proof, rank_proof(self._token, rank, nonce, mine)):
            log.warning("rank %d: a stranger asked for experts and was turned away", self._rank)
            return None
        return int(rank)

    def _hear(self, connection: socket.socket, num_bytes: int, deadline_s: float) -> bytes:
        """A stranger who sends a byte now and then wins no time by it."""
        data = b""
        while len(data) < num_bytes:
            left_s = deadline_s - self._system.now()
            if left_s <= 0:
                raise TimeoutError(f"no proof within {_HANDSHAKE_S:g} s")
            connection.settimeout(left_s)
            part = connection.recv(num_bytes - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _held(self, moe_layer: int, expert: int, digest: bytes) -> tuple[memoryview, memoryview] | None:
        if moe_layer >= len(self._runner.moe_layers):
            return None
        held = self._runner.experts.held(moe_layer, expert, "" if digest == _NO_FILE else digest.hex())
        return None if held is None else (held[0].numpy().data, held[1].numpy().data)

    # --- both -------------------------------------------------------------------------------------------------------

    def _keep(self, one: socket.socket) -> None:
        with self._lock:
            if not self._is_closed:
                self._sockets.add(one)
                return
        _shut(one)
        raise ConnectionAbortedError("the channel is closed")

    def _nonce(self, num_bytes: int) -> bytes:
        return self._system.randbits(8 * num_bytes).to_bytes(num_bytes, "little")


def open_peer_channel(
    runner: ModelRunner,
    store: KeyValueStore,
    *,
    rank: int,
    world_size: int,
    address: str,
    trusted: bool,
    timeout_s: float,
    system: System,
    at_thread_start: Callable[[], None] | None = None,
) -> PeerChannel | None:
    """None where experts would leave the host over a network that nobody called trusted, or where nothing can listen:
    they come from disk then."""
    if not trusted and not is_loopback(address):
        log.info("rank %d: experts come from disk; %s is no trusted network (--trusted-network)", rank, address)
        return None
    try:
        return PeerChannel(
            runner,
            store,
            rank=rank,
            world_size=world_size,
            address=address,
            timeout_s=timeout_s,
            system=system,
            at_thread_start=at_thread_start,
        )
    except OSError as error:
        log.warning("rank %d: experts come from disk; nothing can listen on %s: %s", rank, address, error)
        return None


def _key(rank: int) -> str:
    return f"experts/{rank}"


def _shut(one: socket.socket) -> None:
    """Also wakes a thread that waits in it, which a mere close does not."""
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a socket was down already")
    one.close()


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, out: memoryview) -> None:
    """All of it; EOFError when the peer closes before."""
    while out:
        num_bytes = connection.recv_into(out)
        if not num_bytes:
            raise EOFError
        out = out[num_bytes:]
