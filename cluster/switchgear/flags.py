"""From a settings dataclass to CLI flags, keyword arguments and docs/CONFIG.md: the one config path.

`python -m switchgear.flags` prints docs/CONFIG.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from switchgear.byte_size import parse_bytes
from switchgear_runtime.errors import ConfigError

BYTES = ("_bytes", "_bytes_per_s")  # flags of these settings take `8MiB` too


def flag_name(field_name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + field_name.replace("_", "-")


def settings_of(config_type: type[Any]) -> Iterator[tuple[Field[Any], type[Any], bool]]:
    """(field, plain type, may be None) of each field that has a `help`."""
    hints = get_type_hints(config_type)
    for field in fields(config_type):
        if "help" not in field.metadata:
            continue
        hint = hints[field.name]
        optional = False
        if get_origin(hint) in (Union, UnionType):
            alternatives = [part for part in get_args(hint) if part is not type(None)]
            optional = len(alternatives) < len(get_args(hint))
            hint = alternatives[0]
        yield field, hint, optional


def _default_text(field: Field[Any]) -> str:
    if field.metadata.get("default_text"):
        return str(field.metadata["default_text"])
    if field.default is None or field.default == "":
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


def _byte_count(text: str) -> int:
    """For flags like --max-body-bytes."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_flags(parser: argparse.ArgumentParser, config_type: type[Any], *, skip: frozenset[str] = frozenset()) -> None:
    """One flag a field; booleans get --x and --no-x.

    An absent flag stays absent from the namespace, so defaults live in the dataclass alone.
    """
    group = parser.add_argument_group(config_type.__name__, (config_type.__doc__ or "").splitlines()[0])
    for field, hint, _ in settings_of(config_type):
        if field.name in skip:
            continue
        default = _default_text(field)
        text = field.metadata["help"].replace("%", "%%") + (f" (default: {default})" if default else "")
        options: dict[str, Any] = {"dest": field.name, "help": text, "default": argparse.SUPPRESS}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _byte_count if field.name.endswith(BYTES) else hint
            options["choices"] = field.metadata.get("choices")
            options["metavar"] = None if options["choices"] else field.name.rsplit("_", 1)[-1].upper()
        group.add_argument(flag_name(field.name), **options)


def markdown_table(config_type: type[Any]) -> str:
    """The rows of docs/CONFIG.md for one dataclass."""
    lines = ["| flag | keyword | type | default | meaning |", "|---|---|---|---|---|"]
    for field, hint, optional in settings_of(config_type):
        choices = field.metadata.get("choices")
        kind = " \\| ".join(choices) if choices else hint.__name__
        default = _default_text(field) or ("none" if optional else "empty")
        lines.append(f"| `{flag_name(field.name)}` | `{field.name}` | {kind} | {default} | {field.metadata['help']} |")
    return "\n".join(lines)


def config_markdown() -> str:
    """All of docs/CONFIG.md."""
    from switchgear.config import ServeConfig
    from switchgear_runtime.config import EngineConfig
    from switchgear_runtime.env import ENVIRONMENT

    parts = [
        "# Settings",
        "",
        "Made by `make docs` from the dataclasses; do not edit. "
        "A flag of `switchgear serve` and a keyword of `LLM(...)` have one name and one default.",
        "",
    ]
    for config_type in (ServeConfig, EngineConfig):
        parts += [f"## {config_type.__name__}", "", (config_type.__doc__ or "").splitlines()[0], ""]
        parts += [markdown_table(config_type), ""]
    parts += ["## Environment variables", "", "Process facts only; all are read in `switchgear_runtime/env.py`.", ""]
    parts += ["| variable | meaning |", "|---|---|"]
    parts += [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    print(config_markdown())
