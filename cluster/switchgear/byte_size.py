"""Numbers of bytes as people write them: `parse_bytes("80GiB")`, `format_bytes(n)`."""

from __future__ import annotations

import re

from switchgear_runtime.errors import ConfigError

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_TEXT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """`80GiB`, `1.5 GB`, `268435456`: KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024."""
    found = _TEXT.fullmatch(text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"{text!r} is not a number of bytes; write it like 80GiB, 512MiB, 1.5GB or 268435456")
    whole, _, fraction = found[1].partition(".")
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_bytes(num_bytes: int) -> str:
    """`1.50 GiB`; exact below 1 KiB."""
    if abs(num_bytes) < 1 << 10:
        return f"{num_bytes} B"
    for exponent, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(num_bytes) >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):.2f} {name}"
    raise AssertionError
