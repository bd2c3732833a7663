"""`switchgear placement show|plan|apply|rebalance|pin|load-expert`: what lies where in a running server, and orders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchgear.server_flags import add_admin_flags, admin_key_of
from switchgear_runtime.errors import ConfigError

if TYPE_CHECKING:
    from switchgear.admin_client import AdminClient
    from switchgear.placement.status import OrderReply


class PlacementCommand:
    """A subcommand, in the shape that cli.py's `Command` describes."""

    help = "show and change where experts lie in a running server"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        orders = parser.add_subparsers(dest="order", required=True, metavar="ORDER")
        show = orders.add_parser("show", help="what the placement controller does, and the map in force")
        show.add_argument("--json", action="store_true", help="everything the server says")
        show.add_argument(
            "--save", type=Path, metavar="FILE", help="write the map in force, for apply and --expert-map"
        )
        plan = orders.add_parser("plan", help="what the policy would do now; nothing is done")
        plan.add_argument("--save", type=Path, metavar="FILE", help="write the proposed map")
        rebalance = orders.add_parser("rebalance", help="plan and migrate now, within the byte budget")
        apply = orders.add_parser("apply", help="migrate to the map of a file")
        apply.add_argument("file", type=Path, metavar="FILE")
        pin = orders.add_parser("pin", help="keep experts on chosen ranks in all plans to come; alone: show the pins")
        pin.add_argument("pins", nargs="*", metavar="LAYER:EXPERT=RANK,...", help="exactly these ranks hold it")
        pin.add_argument("--clear", action="store_true", help="drop the earlier pins")
        load = orders.add_parser(
            "load-expert",
            help="give one expert the weights of a file; running sequences keep the old ones",
            description="Give one expert the weights of a safetensors file (gate_proj.weight, up_proj.weight and "
            "down_proj.weight, or the checkpoint's names of that expert) as a new version of the model. Sequences that "
            "run finish with the weights they began with. Each rank's host reads the file, and keeps a copy in the weight "
            "cache's folder for ranks that come later; without that folder, or with ranks on further hosts, keep the file "
            "where it is. Give each file a name of its own. A server that is started anew begins with the checkpoint, and maps "
            "that are saved know nothing of it.",
        )
        load.add_argument("file", type=Path, metavar="FILE")
        load.add_argument("--layer", type=int, required=True, help="which of the MoE layers, from 0")
        load.add_argument("--expert", type=int, required=True, help="which expert of that layer, from 0")
        for order in (show, plan, rebalance, apply, pin, load):
            add_admin_flags(order)

    def run(self, arguments: argparse.Namespace) -> int:
        from switchgear.admin_client import AdminClient

        with AdminClient(arguments.url, admin_key_of(arguments)) as client:
            getattr(self, arguments.order.replace("-", "_"))(client, arguments)
        return 0

    def show(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        import msgspec

        from switchgear.placement_text import status_lines

        status = client.placement()
        if arguments.save:
            if status.expert_map is None:
                raise ConfigError("there is no map yet: the ranks have not started")
            _save(arguments.save, status.expert_map)
        if arguments.json:
            print(msgspec.json.format(msgspec.json.encode(status), indent=1).decode())
        else:
            print("\n".join(status_lines(status)))

    def plan(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        reply = client.plan()
        if arguments.save and reply.expert_map is not None:
            _save(arguments.save, reply.expert_map)
        _print(reply)

    def rebalance(self, client: AdminClient, _: argparse.Namespace) -> None:
        _print(client.rebalance())

    def apply(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        try:
            expert_map = json.loads(arguments.file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{arguments.file} has no expert map: {error}") from None
        _print(client.apply(expert_map))

    def load_expert(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        _print(client.load_expert(arguments.layer, arguments.expert, str(arguments.file.expanduser().absolute())))

    def pin(self, client: AdminClient, arguments: argparse.Namespace) -> None:
        kept = [] if arguments.clear else client.placement().pinned
        pins = {(layer, expert): ranks for layer, expert, ranks in [*kept, *map(parse_pin, arguments.pins)]}
        if arguments.clear or arguments.pins:
            client.pin([(*key, ranks) for key, ranks in sorted(pins.items())])
        for (layer, expert), ranks in sorted(pins.items()):
            print(f"layer {layer} expert {expert}: ranks {', '.join(map(str, ranks))}")
        if not pins:
            print("no pins")


def parse_pin(text: str) -> tuple[int, int, list[int]]:
    """`3:17=0,2` -> (3, 17, [0, 2])."""
    try:
        place, ranks = text.split("=")
        layer, expert = place.split(":")
        return int(layer), int(expert), [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise ConfigError(f"pin {text!r} must look like LAYER:EXPERT=RANK,RANK, as in 3:17=0,2") from None


def _print(reply: OrderReply) -> None:
    from switchgear.placement_text import reply_lines

    print("\n".join(reply_lines(reply)))


def _save(path: Path, expert_map: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(expert_map) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


PLACEMENT = PlacementCommand()
