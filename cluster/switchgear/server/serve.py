"""`switchgear serve`: a Cluster behind an HTTP server, from start to the end of a graceful shutdown: `run_server`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from switchgear.cluster import Cluster
from switchgear.config import ServeConfig, split_settings
from switchgear.server.app import create_app
from switchgear.server.connections import http_config
from switchgear.server.scale_route import ScaleRoute
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.env import admin_key_of_environment, api_key_of_environment
from switchgear_runtime.errors import ConfigError, RankFailed

log = logging.getLogger(__name__)

_CLOSE_CONNECTIONS_S = 5  # for responses whose sequences have all ended
_WATCH_S = 0.5


def run_server(*, on_ready: Callable[[str], None] | None = None, **settings: Any) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean shutdown. `settings` as the CLI's flags (see config.settings).

    Prints one line with the URL on stdout once requests are taken, then calls `on_ready` with it. The first signal
    stops accepting and lets running requests finish for at most drain_timeout_s; a second one skips the wait.
    """
    serve, engine = split_settings(with_keys(settings))
    logging.basicConfig(
        level=serve.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return asyncio.run(_serve(serve, engine, on_ready or (lambda _: None)))


def with_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Keys that are not among the settings come from the environment, which other users cannot list."""
    found = {"api_key": api_key_of_environment, "admin_key": admin_key_of_environment}
    return settings | {name: of_environment() for name, of_environment in found.items() if settings.get(name) is None}


async def _serve(serve: ServeConfig, engine: EngineConfig, on_ready: Callable[[str], None]) -> int:
    signals = _Signals()
    listener = _listen(serve.host, serve.port)
    with contextlib.closing(listener), signals:
        cluster = Cluster(serve, engine)
        app = create_app(
            cluster.core,
            model_name=cluster.model_name,
            api_key=serve.api_key,
            admin_key=serve.admin_key,
            placement=cluster.placement,
            admin_routes=ScaleRoute(cluster.core, cluster.scale).routes(),
            why_not_ready=lambda: cluster.not_ready_reason,
        )
        http = _HttpServer(
            http_config(app, max_connections=serve.max_connections, close_timeout_s=_CLOSE_CONNECTIONS_S)
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))  # /health answers while the ranks load
        starting = asyncio.create_task(cluster.start())
        interrupted = asyncio.create_task(signals.first.wait())
        try:
            await asyncio.wait((starting, serving, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                url = _url(listener)
                print(f"switchgear serves {cluster.model_name} at {url}", flush=True)
                on_ready(url)
                while not signals.first.is_set() and not serving.done() and cluster.failure is None:
                    await asyncio.wait((serving, interrupted), timeout=_WATCH_S, return_when=asyncio.FIRST_COMPLETED)
            if cluster.failure is not None:
                raise RankFailed(cluster.failure)
            cluster.core.draining = True
            await _drain(cluster, signals, serve.drain_timeout_s)
            return 0
        finally:
            starting.cancel()
            interrupted.cancel()
            cluster.core.abort_all()
            http.should_exit = True
            await asyncio.gather(serving, starting, interrupted, return_exceptions=True)
            await cluster.stop(0)


async def _drain(cluster: Cluster, signals: _Signals, timeout_s: float) -> None:
    """Until every accepted sequence has ended, the time is up, or somebody signals again."""
    if cluster.core.num_live:
        log.info("draining: %d sequences are running", cluster.core.num_live)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while cluster.core.num_live and not signals.second.is_set():
                await asyncio.sleep(0.05)


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """`first` and `second` SIGTERM or SIGINT, as events; the handlers are put back at the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is started, so that a taken port costs no model load."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"host={host!r} port={port} cannot be listened on ({error}); choose another with --host, --port"
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
