"""One rank's process: `RankWorker` connects to the server, loads the model, says Hello and runs the engine.

`python -m switchgear_runtime.rank_worker` reads its configuration, one line of JSON, from stdin (so that the token shows
in no process list) and dies with its parent; the Ray launcher runs the same `RankWorker` inside an actor. A rank that
loses its link ends at once: nobody could use it, and nobody else would end it.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cpu_claim import CpuClaim, claim_cpus
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.generation import GenerationDescriptor
from switchgear_runtime.inbox import Inbox
from switchgear_runtime.link import RankLink
from switchgear_runtime.link_store import LinkStore
from switchgear_runtime.messages import Fault, StoreValue, ToRank
from switchgear_runtime.parent_death import set_parent_death_signal
from switchgear_runtime.system import RealSystem

CONFIG_BYTES_MAX = 16 << 20  # nearly all of it an expert map, as in a frame
EXIT_FAILED, EXIT_LINK_LOST, EXIT_SIGTERM = 1, 3, 128 + signal.SIGTERM

log = logging.getLogger(__name__)


class RankWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told at birth. `engine`: EngineConfig's fields. `token`: hexadecimal, for this process alone.
    `expert_map` (ExpertMap.to_json): the one in force, by which it loads; None: contiguous."""

    rank: int
    world_size: int
    engine: dict[str, Any]
    host: str
    port: int
    token: str
    host_name: str = ""  # ranks that share it share memory
    domain_name: str = ""  # ranks that share it have fast links between their devices; empty: those of a host
    connect_timeout_s: float = 10.0
    start_timeout_s: float = 0.0  # after that, the server ends whoever has not entered a generation; 0: unknown
    expert_map: dict[str, Any] | None = None
    log_level: str = "info"
    parent_pid: int = 0  # dies with it; 0: somebody else sees to that


class RankWorker:
    """Everything of one rank. `run` returns when all ranks have agreed to stop."""

    def __init__(self, config: RankWorkerConfig) -> None:
        self.config = config
        self._system = RealSystem()
        self._link: RankLink | None = None
        self._meeting: str | None = None  # the channel whose rendezvous is under way
        self._parent_bound = config.parent_pid != 0
        self._cpus: CpuClaim | None = None  # held as long as this lives

    def run(self) -> None:
        """Raises what kept the rank from starting, after reporting it to the server."""
        config = self.config
        self._link = link = RankLink.connect(
            (config.host, config.port),
            bytes.fromhex(config.token),
            config.rank,
            timeout_s=config.connect_timeout_s,
            system=self._system,
        )
        inbox: Inbox[Any] = Inbox(self._system)
        store = LinkStore(link.send, self._system)

        def deliver(message: ToRank) -> None:
            if isinstance(message, StoreValue):
                store.take(message)
            else:
                inbox.put(message)

        link.start_reader(self._system, deliver, self.die)
        try:
            engine = self._load(inbox, link, store)
        except Exception as error:
            # Generation 0: before any. The server fails its start with this text, instead of waiting for a deadline.
            link.send(
                Fault(rank=config.rank, generation=0, step=0, kind=type(error).__name__, peers=[], message=str(error))
            )
            raise
        hello = engine.hello(os.getpid())
        link.send(msgspec.structs.replace(hello, host=config.host_name, domain=config.domain_name))
        gc.freeze()  # what loading made stays to the end; collections in the middle of a step need not look at it
        engine.run()
        link.close()

    def die(self, reason: str, status: int = EXIT_LINK_LOST) -> None:
        """End the process now, from any thread. The kernel unmaps a transport; only a rendezvous has a name to
        remove."""
        log.warning("ends at once: %s", reason)
        channel = self._meeting
        if channel is not None:
            sweep_channel(channel)
        _exit(status)

    def _load(self, inbox: Inbox[Any], link: RankLink, store: LinkStore) -> Any:
        # Imported here: they bring torch, and a rank should connect, and be able to report, before that.
        start_s = time.monotonic()
        with _no_garbage_collection():
            from switchgear_runtime.comm.loopback import LoopbackHub
            from switchgear_runtime.comm.network import Network, check_network
            from switchgear_runtime.comm.rendezvous import open_transport
            from switchgear_runtime.comm.transport import Transport
            from switchgear_runtime.cuda.preflight import require_gpu
            from switchgear_runtime.engine import Engine
            from switchgear_runtime.link_store import ChannelStore
            from switchgear_runtime.migration.background import step_back
            from switchgear_runtime.migration.peer_channel import PeerChannel, open_peer_channel
            from switchgear_runtime.model.checkpoint import Checkpoint
            from switchgear_runtime.model.spec import load_spec
            from switchgear_runtime.model_runner import ModelRunner
            from switchgear_runtime.moe.expert_map import ExpertMap
            from switchgear_runtime.moe.rehome import resized

        imported_s = time.monotonic()
        config = self.config
        engine_config = EngineConfig(**config.engine)
        if engine_config.transport == "loopback" and config.world_size > 1:
            raise ConfigError("transport='loopback' joins ranks inside one process; processes need transport='auto'")
        if engine_config.transport == "gloo" and config.world_size > 1:
            check_network(link.own_address, trusted=engine_config.trusted_network)
        if engine_config.bind_cpus:  # before any compute thread starts: threads inherit it
            self._cpus = claim_cpus(engine_config.num_threads, num_ranks=config.world_size)
            if self._cpus is not None:
                log.info("bound to CPUs %s", sorted(self._cpus.cpus))
        if engine_config.device == "cuda":
            transport, dispatch = engine_config.transport, engine_config.dispatch
            require_gpu(num_ranks=config.world_size, transport=transport, dispatch=dispatch)
        spec = load_spec(engine_config.model)
        checkpoint = Checkpoint(engine_config.model, spec)
        expert_map = None
        if config.expert_map is not None:
            expert_map = resized(ExpertMap.from_json(config.expert_map), config.world_size)
        runner = ModelRunner(
            engine_config, spec, checkpoint, rank=config.rank, world_size=config.world_size, expert_map=expert_map
        )

        log.info(
            "imported torch in %.2f s, loaded weights in %.2f s", imported_s - start_s, time.monotonic() - imported_s
        )

        def meet(descriptor: GenerationDescriptor) -> Transport:
            self._meeting = descriptor.channel
            if self._parent_bound:
                set_parent_death_signal(signal.SIGTERM)  # `die` then removes the name; SIGKILL could not
            try:
                return open_transport(
                    engine_config.transport,
                    descriptor,
                    config.rank,
                    mailbox_bytes=runner.mailbox_bytes(descriptor.world_size),
                    timeout_s=engine_config.step_timeout_s,
                    hub=LoopbackHub(1, self._system) if engine_config.transport == "loopback" else None,
                    network=Network(
                        store=store.enter(descriptor.channel),
                        address=link.own_address,  # reaches the server, and so the other ranks
                        trusted=engine_config.trusted_network,
                    ),
                    device=runner.device,
                    dispatch="flat" if engine_config.device == "cpu" else engine_config.dispatch,
                )
            finally:
                self._meeting = None
                if self._parent_bound:
                    set_parent_death_signal(signal.SIGKILL)

        def open_peers(descriptor: GenerationDescriptor) -> PeerChannel | None:
            if descriptor.world_size == 1:
                return None
            return open_peer_channel(
                runner,
                ChannelStore(store, descriptor.channel),
                rank=config.rank,
                world_size=descriptor.world_size,
                address=link.own_address,
                trusted=engine_config.trusted_network,
                timeout_s=engine_config.step_timeout_s,
                system=self._system,
                at_thread_start=step_back,
            )

        return Engine(
            engine_config,
            runner,
            rank=config.rank,
            system=self._system,
            inbox=inbox,
            send=link.send,
            open_transport=meet,
            open_peers=open_peers,
            at_stager_start=step_back,
            start_timeout_s=config.start_timeout_s / 2,  # the ranks' verdict names the absent, the server's all
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: they make many objects and hardly any garbage, and looking for it takes a tenth of torch's import."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def sweep_channel(channel: str) -> None:
    """Remove the names that ranks may have left when they died while meeting; nobody of that generation may be
    alive."""
    from switchgear_runtime.comm.segment import unlink_channels

    unlink_channels(channel)


def configure_logging(rank: int, level: str) -> None:
    """To stderr, which the launcher keeps."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
    )


def _bind_to_parent(worker: RankWorker) -> None:
    """Die with the parent: by the kernel's signal, by the end of stdin, and by asking once whether it is already
    gone."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != worker.config.parent_pid:
        os._exit(EXIT_LINK_LOST)

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        worker.die("the parent closed stdin")

    def watch_sigterm() -> None:
        signal.sigwait({signal.SIGTERM})
        worker.die("SIGTERM", EXIT_SIGTERM)

    for watch in (watch_stdin, watch_sigterm):
        threading.Thread(target=watch, name=watch.__name__, daemon=True).start()


def _exit(status: int) -> NoReturn:
    """At once: to take torch and the weights down in order costs a second and serves nobody."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread; one thread waits for it
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < CONFIG_BYTES_MAX:
        part = os.read(0, 1 << 16)  # unbuffered: what follows the line is left to watch_stdin
        if not part:
            _exit(EXIT_LINK_LOST)  # the parent changed its mind, or died
        line += part
    config = msgspec.json.decode(bytes(line), type=RankWorkerConfig)
    configure_logging(config.rank, config.log_level)
    faulthandler.enable()  # a crash of native code leaves its stack in the log
    worker = RankWorker(config)
    if config.parent_pid:
        _bind_to_parent(worker)
    try:
        worker.run()
    except Exception:
        log.exception("the rank failed")
        _exit(EXIT_FAILED)
    _exit(0)


if __name__ == "__main__":
    main()
