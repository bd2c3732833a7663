"""`switchgear scale --ranks N`: grow or shrink a running server's cluster while its requests go on."""

from __future__ import annotations

import argparse

from switchgear.server_flags import add_admin_flags, admin_key_of


class ScaleCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "grow or shrink a running server; its requests go on"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", type=int, required=True, metavar="N", help="how many ranks there shall be")
        add_admin_flags(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.admin_client import AdminClient
        from switchgear.outputs import ScaleReply

        with AdminClient(arguments.url, admin_key_of(arguments)) as client:
            reply = client.call("POST", "/admin/scale", ScaleReply, {"ranks": arguments.ranks})
        print(
            f"{reply.ranks} ranks serve, in generation {reply.generation}; {reply.num_carried} sequences changed rank"
        )
        return 0


SCALE = ScaleCommand()
