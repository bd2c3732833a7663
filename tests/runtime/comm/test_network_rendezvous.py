"""How network transports meet and part: who is missing, which networks are refused, what notes say."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from comm_ranks import MAILBOX_BYTES, fresh_channel
from comm_scenarios import FolderStore

from switchgear_runtime.comm.gloo import GlooTransport
from switchgear_runtime.comm.network import Network, check_network
from switchgear_runtime.comm.rendezvous import open_transport
from switchgear_runtime.comm.segment import channel_path, create_segment, unlink_channels
from switchgear_runtime.comm.store import FailureNotes, Note
from switchgear_runtime.errors import ConfigError, PeerLost, TransportAborted, TransportError, TransportTimeout
from switchgear_runtime.generation import GenerationDescriptor


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(store=FolderStore(str(tmp_path)))


def test_missing_ranks_are_named(network: Network) -> None:
    errors: dict[int, TransportError] = {}

    def join(rank: int) -> None:
        try:
            GlooTransport(network, rank, 4, mailbox_bytes=MAILBOX_BYTES, timeout_s=0.3)
        except TransportError as error:
            errors[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 2)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 5
    for rank in (0, 2):
        assert isinstance(errors[rank], TransportTimeout)
        assert errors[rank].peers == (1, 3)


def test_ranks_that_call_differently_are_told_so(network: Network) -> None:
    outcomes: dict[int, object] = {}

    def run(rank: int) -> None:
        transport = GlooTransport(network, rank, 2, mailbox_bytes=MAILBOX_BYTES, timeout_s=20)
        try:
            outcomes[rank] = transport.barrier(timeout_s=20) if rank else transport.all_gather(b"", timeout_s=20)
        except TransportError as error:
            outcomes[rank] = error
        transport.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any("ranks disagree on their calls" in str(outcome) for outcome in outcomes.values()), outcomes
    assert all(isinstance(outcome, TransportError) for outcome in outcomes.values()), outcomes


@pytest.mark.parametrize("address", ["192.0.2.7", "10.0.0.1", "2001:db8::1", "0.0.0.0"])
def test_a_network_is_not_trusted_by_default(address: str) -> None:
    with pytest.raises(ConfigError, match="set trusted_network=True"):
        check_network(address, trusted=False)
    check_network(address, trusted=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.2.1", "::1"])
def test_the_loopback_interface_is(address: str) -> None:
    check_network(address, trusted=False)


def test_an_untrusted_network_is_refused_before_anything_listens(network: Network) -> None:
    outside = Network(store=network.store, address="192.0.2.7")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"):
        GlooTransport(outside, 0, 2, mailbox_bytes=MAILBOX_BYTES, timeout_s=1)


def test_what_open_transport_refuses() -> None:
    two_hosts = GenerationDescriptor(
        term=1, generation=1, world_size=2, epoch=0, channel=fresh_channel(), hosts=("a", "b")
    )
    for kind, match in (
        ("shm", r"needs one host, but the ranks are on 2; use transport='auto'"),
        ("auto", "needs a store"),
        ("pigeon", "choose one of auto, loopback, shm, gloo, nccl, mpi"),
    ):
        with pytest.raises(ConfigError, match=match):
            open_transport(kind, two_hosts, 0, mailbox_bytes=MAILBOX_BYTES, timeout_s=1)


@pytest.mark.parametrize(
    ("note", "kind", "peers"),
    [
        (Note("PeerLost", (3,), "rank 3 is dead"), PeerLost, (3,)),
        (Note("TransportTimeout", (3,), "waited"), TransportTimeout, (3,)),
        (Note("TransportTimeout", (0, 3), "waited for us too"), TransportAborted, (1,)),
        (Note.of_abort(2, "enough"), TransportAborted, (2,)),
        (Note.of_abort(0, "our own abort comes back"), TransportAborted, ()),
        (Note.of_close(1), PeerLost, (1,)),
        (Note("TransportError", (2,), "ranks disagree"), TransportAborted, (1,)),
    ],
)
def test_whom_a_rank_blames_for_what_a_note_says(
    network: Network, note: Note, kind: type[TransportError], peers: tuple[int, ...]
) -> None:
    notes = FailureNotes(network.store, 1)
    notes.leave(note)
    notes.leave(Note.of_abort(1, "only the first note counts"))
    error = FailureNotes(network.store, 0).blame(1, "barrier (call 7)")
    assert (type(error), error.rank, error.peers) == (kind, 0, peers)
    assert note.text in str(error)


def test_a_rank_without_a_note_is_dead(network: Network) -> None:
    error = FailureNotes(network.store, 0).blame(1, "barrier (call 7)")
    assert (type(error), error.peers) == (PeerLost, (1,))


def test_the_sweep_covers_each_hosts_channel() -> None:
    channel = fresh_channel()
    names = [channel, f"{channel}-0", f"{channel}-1"]
    kept = [create_segment(name, 4096, rank=0) for name in names]
    unlink_channels(channel)
    assert not [name for name in names if channel_path(name).exists()]
    assert len(kept) == 3
