"""The server's end of the ranks' links: `LinkServer`. The protocol is in switchgear_runtime.link.

Accepts, shakes hands, reads with one task a rank, and writes to ranks that read (link_writer.py).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import Callable

from switchgear.link_writer import LinkWriter
from switchgear_runtime.errors import WireError
from switchgear_runtime.link import (
    ACCEPTED,
    GREETING,
    MAGIC,
    NONCE_BYTES,
    PREFIX_BYTES,
    PROOF_BYTES,
    TOKEN_BYTES,
    frame,
    frame_length,
    rank_proof,
    server_proof,
    set_socket_deadlines,
)
from switchgear_runtime.messages import FromRank, ToRank, decode_from_rank, encode
from switchgear_runtime.system import System

HANDSHAKE_TIMEOUT_S = 5.0
HANDSHAKES_MAX = 64  # at once; one more ends the oldest, so that strangers neither pile up nor keep a rank out

log = logging.getLogger(__name__)


class LinkServer:
    """Callbacks run on the event loop's thread. `on_lost(rank, reason)`: once for a link that ends without `drop`."""

    def __init__(
        self,
        *,
        system: System,
        on_message: Callable[[int, FromRank], None],
        on_lost: Callable[[int, str], None],
        on_malformed: Callable[[int, str], None],
    ) -> None:
        self._system = system
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_malformed = on_malformed
        self._tokens: dict[int, bytes] = {}
        self._writers: dict[int, LinkWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._guests: dict[asyncio.StreamWriter, None] = {}  # who shakes hands, oldest first
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`: the loopback interface or the cluster's address, never all interfaces."""
        assert host not in ("", "0.0.0.0", "::")
        self._server = await asyncio.start_server(self._serve, host, 0, limit=1 << 20)
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    def expect(self, rank: int) -> bytes:
        """A fresh token for the next process of `rank`; an earlier process of that rank gets in no more."""
        self.drop(rank)
        token = self._system.randbits(8 * TOKEN_BYTES).to_bytes(TOKEN_BYTES, "little")
        self._tokens[rank] = token
        return token

    def send(self, rank: int, message: ToRank) -> None:
        """Queue a message; one for a rank without a link is dropped (its end is on its way as an event of its own)."""
        writer = self._writers.get(rank)
        if writer is None or writer.is_closing:
            log.debug("no link to rank %d for %s", rank, type(message).__name__)
            return
        writer.write(frame(encode(message)))

    def drop(self, rank: int) -> None:
        """Close the link of `rank`, if any, and let nobody in its place until `expect`."""
        self._tokens.pop(rank, None)
        writer = self._writers.pop(rank, None)
        if writer is not None:
            writer.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for rank in list(self._writers):
            self.drop(rank)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HANDSHAKE_TIMEOUT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection's life."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            rank = await self._admit(reader, writer)
            if rank is not None:
                await self._read(rank, reader, writer)
        except asyncio.CancelledError:
            log.debug("a link was cancelled by close()")
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
        """The rank at the other end, if it proves the token it was given."""
        if len(self._guests) >= HANDSHAKES_MAX:
            oldest = next(iter(self._guests))
            del self._guests[oldest]
            oldest.transport.abort()
        self._guests[writer] = None
        try:
            return await asyncio.wait_for(self._shake_hands(reader, writer), HANDSHAKE_TIMEOUT_S)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            log.warning("a connection to the link port broke off its handshake")
            return None
        except WireError as error:
            log.warning("a connection to the link port was refused: %s", error)
            return None
        finally:
            self._guests.pop(writer, None)

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        magic, rank, rank_nonce = GREETING.unpack(await reader.readexactly(GREETING.size))
        if magic != MAGIC:
            raise WireError(f"it begins with {magic!r}, not {MAGIC!r}")
        # A stranger must not learn which ranks are awaited, so an unknown rank is refused like a wrong proof: with a
        # token nobody has.
        token = self._tokens.get(rank) or self._system.randbits(8 * TOKEN_BYTES).to_bytes(TOKEN_BYTES, "little")
        server_nonce = self._system.randbits(8 * NONCE_BYTES).to_bytes(NONCE_BYTES, "little")
        writer.write(server_nonce + server_proof(token, rank, rank_nonce, server_nonce))
        proof = await reader.readexactly(PROOF_BYTES)
        if not hmac.compare_digest(proof, rank_proof(token, rank, rank_nonce, server_nonce)):
            raise WireError(f"it could not prove the token of rank {rank}")
        if writer not in self._guests:
            raise WireError("it made room for a later one")
        if self._tokens.pop(rank, None) != token:  # a token admits once
            raise WireError(f"the token of rank {rank} was used or withdrawn")
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_socket_deadlines(connection)
        del self._guests[writer]
        # Here, with no await since the token was taken, so that `drop` finds it.
        self._writers[rank] = self._link_writer(rank, writer)
        writer.write(ACCEPTED)
        return int(rank)

    async def _read(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length = frame_length(await reader.readexactly(PREFIX_BYTES))
                message = decode_from_rank(await reader.readexactly(length))
                claimed = getattr(message, "rank", rank)
                if claimed != rank:
                    raise WireError(f"the link of rank {rank} carries a {type(message).__name__} of rank {claimed}")
                self._on_message(rank, message)
        except WireError as error:
            if self._forget(rank, writer):
                self._on_malformed(rank, str(error))
        except (OSError, asyncio.IncompleteReadError) as error:
            if self._forget(rank, writer):
                closed = isinstance(error, asyncio.IncompleteReadError)
                self._on_lost(rank, "the process closed it" if closed else str(error))

    def _forget(self, rank: int, writer: asyncio.StreamWriter) -> bool:
        """False when `drop` was first."""
        current = self._writers.get(rank)
        if current is None or not current.belongs_to(writer):
            return False
        self._writers.pop(rank).abort()
        return True

    def _link_writer(self, rank: int, writer: asyncio.StreamWriter) -> LinkWriter:
        def on_stuck(reason: str) -> None:
            self.drop(rank)
            self._on_malformed(rank, reason)

        return LinkWriter(writer, system=self._system, on_stuck=on_stuck)
