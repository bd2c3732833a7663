"""Prompts of drifting traffic, by domain, and whose traffic each domain is: four languages, prose and code."""

from __future__ import annotations

from pathlib import Path

from switchgear.demo_prompts import PROMPTS_BY_DOMAIN
from switchgear_runtime.errors import ConfigError

PIECE_CHARS = 240  # of a prompt that is cut from a file
_PIECES_MAX = 256  # of one file

_MORE: dict[str, tuple[str, ...]] = {
    "spanish": (
        "Esta orden muestra la lista de los",
        "El fichero de configuración se lee cuando",
        "Si no se da ninguna opción, el valor",
        "El usuario puede cambiar",
        "Véase también la página de manual de",
    ),
    "prose": (
        "The first thing to know about computers is that",
        "A man walked into the office and said:",
        "If at first you don't succeed,",
        "Nobody ever went broke by",
        "There are two kinds of people in the world:",
    ),
}
TENANT_OF_DOMAIN = {
    "verse": "readers",
    "prose": "readers",
    "dictionary": "readers",
    "python": "coders",
    "c": "coders",
    "kernel": "coders",
    "german": "translators",
    "french": "translators",
    "spanish": "translators",
    "arithmetic": "pupils",
}


def traffic_prompts() -> dict[str, tuple[str, ...]]:
    """Our own, in one order."""
    return {domain: ({**PROMPTS_BY_DOMAIN, **_MORE})[domain] for domain in TENANT_OF_DOMAIN}


def prompts_in(folder: Path) -> dict[str, tuple[str, ...]]:
    """A domain per text file of the folder: its pieces, begun at line starts. The tenant is the domain itself."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ConfigError(f"--prompts {folder} has no .txt files; it needs one per domain")
    prompts: dict[str, tuple[str, ...]] = {}
    for path in files:
        pieces: list[str] = []
        piece = ""
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE_CHARS:
                pieces.append(piece[: 2 * PIECE_CHARS])
                piece = ""
        if not pieces:
            raise ConfigError(f"--prompts {path} is shorter than one piece of {PIECE_CHARS} characters")
        prompts[path.stem] = tuple(pieces[:: -(-len(pieces) // _PIECES_MAX)])
    return prompts
