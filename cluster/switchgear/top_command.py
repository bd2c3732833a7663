"""`switchgear top`: a running server at a glance, refreshed live. Reads /metrics and /ready; needs no admin key."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from switchgear.server_flags import add_client_flags, api_key_of
from switchgear_runtime.errors import ConfigError

if TYPE_CHECKING:
    import httpx

    from switchgear.top_view import Snapshot

TIMEOUT_S = 10.0


class TopCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "watch a running server: ranks, load, hot experts, migrations"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_client_flags(parser)
        parser.add_argument("--interval-s", type=float, default=1.0, help="between two looks (default: 1)")
        parser.add_argument("--once", action="store_true", help="look twice, print one page, end")

    def run(self, arguments: argparse.Namespace) -> int:
        import httpx
        from rich.console import Console
        from rich.live import Live

        from switchgear import http_calls
        from switchgear.top_view import view

        if not 0.05 <= arguments.interval_s <= 3600:
            raise ConfigError(f"--interval-s {arguments.interval_s} must be from 0.05 to 3600")
        console = Console()
        with httpx.Client(**http_calls.options(arguments.url, api_key_of(arguments), TIMEOUT_S)) as http:
            before = look(http, arguments.url)
            if arguments.once:
                time.sleep(arguments.interval_s)
                console.print(view(look(http, arguments.url), before, width=console.width))
                return 0
            with Live(view(before, None, width=console.width), console=console, screen=True) as live:
                while True:  # until Ctrl-C
                    time.sleep(arguments.interval_s)
                    now = look(http, arguments.url)
                    live.update(view(now, before, width=console.width))
                    before = now


def look(http: httpx.Client, url: str) -> Snapshot:
    import httpx

    from switchgear import http_calls
    from switchgear.top_view import Snapshot

    try:
        metrics = http_calls.checked(http.get("/metrics"))
        ready = http.get("/ready")
    except httpx.HTTPError as error:
        raise http_calls.unreachable(url, error) from error
    return Snapshot.of(metrics.decode(), ready.content, time.monotonic())


TOP = TopCommand()
