"""The text that the bundled model is trained on: ten domains, from files that Debian packages and CPython install.

`missing_packages` names what to `apt-get install` before anything is read. `read_domains` gives each domain's pieces, in
one order for one seed; `split` keeps some of them out of training.

Where a package's text lies (found in Debian 12):

    verse       bible-kjv         printed by its program `bible`
    fortune     fortunes          /usr/share/games/fortunes/*
    dictionary  wordnet-base      /usr/share/wordnet/data.*
    kernel      linux-doc-6.1     /usr/share/doc/linux-doc-6.1/html/_sources/**/*.txt
    python      (CPython's own)   the standard library
    c           linux-libc-dev    /usr/include/**/*.h
    de, fr, es  manpages-*, fortunes-*
    arithmetic  (made here)
"""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE_CHARS = 4096  # a text is cut into pieces of about so many characters, at ends of lines
HELDOUT_OF = 50  # one piece of so many is never trained on
DOMAIN_CHARS_MAX = 6_000_000  # so that no domain drowns the others
READ_TIMEOUT_S = 60.0
_ROFF = (
    (re.compile(r"^\.\\\".*\n|^'\\\".*\n", re.M), ""),  # comments
    (re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\f\[[A-Z]*\]|\\&|\\/|\\,"), ""),
    (re.compile(r"\\\(aq|\\\(cq|\\\(oq"), "'"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"^\.(SH|SS|B|I|BR|IR|RB|BI|IB|RI|TH|TP|IP)\b ?", re.M), ""),
    (re.compile(r"^\.[A-Za-z]{1,3}\b.*\n", re.M), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


@dataclass(frozen=True, slots=True)
class Domain:
    name: str
    packages: dict[str, str]  # Debian package -> a path below the root that it installs
    read: Callable[[Path], Iterator[str]]


def _texts(root: Path, pattern: str) -> Iterator[str]:
    for path in sorted(root.glob(pattern)):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            try:
                yield data.decode()
            except UnicodeDecodeError:
                continue  # another encoding: an old page or a binary


def _verse(root: Path) -> Iterator[str]:
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    yield subprocess.run(command, capture_output=True, text=True, check=True, timeout=READ_TIMEOUT_S).stdout


def _fortune(root: Path) -> Iterator[str]:
    yield from _fortunes(root, "usr/share/games/fortunes/*")


def _fortunes(root: Path, pattern: str) -> Iterator[str]:
    for path in sorted(root.glob(pattern)):
        if path.is_file() and path.suffix not in {".dat", ".u8"}:
            text = path.read_bytes().decode(errors="replace")
            if "\x00" not in text:
                yield re.sub(r"^%.*$", "", text, flags=re.M)


def _dictionary(root: Path) -> Iterator[str]:
    """`harbor (noun): a sheltered port ...`"""
    for kind, shown in (("noun", "noun"), ("verb", "verb"), ("adj", "adj"), ("adv", "adv")):
        lines = []
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text().splitlines():
            fields, _, gloss = line.partition(" | ")
            if gloss and not line.startswith("  "):
                lines.append(f"{fields.split()[4].replace('_', ' ')} ({shown}): {gloss.strip()}")
        yield "\n".join(lines)


def _kernel(root: Path) -> Iterator[str]:
    yield from _texts(root, "usr/share/doc/linux-doc-*/html/_sources/**/*.txt")
    yield from _texts(root, "usr/share/doc/linux-doc-*/html/_sources/**/*.txt.gz")


def _python(_: Path) -> Iterator[str]:
    yield from _texts(Path(sysconfig.get_path("stdlib")), "*.py")


def _c(root: Path) -> Iterator[str]:
    yield from _texts(root, "usr/include/linux/**/*.h")


def _language(code: str, *fortunes: str) -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        for text in _texts(root, f"usr/share/man/{code}/man*/*.gz"):
            for pattern, replacement in _ROFF:
                text = pattern.sub(replacement, text)
            yield text
        for pattern_of_files in fortunes:
            yield from _fortunes(root, pattern_of_files)

    return read


DOMAINS = (
    Domain("verse", {"bible-kjv": "usr/bin/bible", "bible-kjv-text": "usr/lib/bible.data"}, _verse),
    Domain("fortune", {"fortunes": "usr/share/games/fortunes/computers"}, _fortune),
    Domain("dictionary", {"wordnet-base": "usr/share/wordnet/data.noun"}, _dictionary),
    Domain("kernel", {"linux-doc-6.1": "usr/share/doc/linux-doc-*/html/_sources"}, _kernel),
    Domain("python", {}, _python),
    Domain("c", {"linux-libc-dev": "usr/include/linux/types.h"}, _c),
    Domain(
        "de",
        {"manpages-de": "usr/share/man/de/man1", "fortunes-de": "usr/share/games/fortunes/de"},
        _language("de", "usr/share/games/fortunes/de/*"),
    ),
    Domain("fr", {"manpages-fr": "usr/share/man/fr/man1"}, _language("fr")),
    Domain(
        "es",
        {"manpages-es": "usr/share/man/es/man1", "fortunes-es": "usr/share/games/fortunes/es"},
        _language("es", "usr/share/games/fortunes/es/*"),
    ),
    Domain("arithmetic", {}, lambda _: iter([arithmetic(random.Random(0), 40_000)])),
)


def arithmetic(rng: random.Random, num_lines: int) -> str:
    """`653 * 94 = 4982`"""
    lines = []
    for _ in range(num_lines):
        high = rng.choice((10, 100, 100, 1000))
        a, b = rng.randrange(high), rng.randrange(min(high, 100))
        sign, value = rng.choice((("+", a + b), ("-", a - b), ("*", a * b)))
        lines.append(f"{a} {sign} {b} = {value}")
    return "\n".join(lines) + "\n"


def missing_packages(root: Path, domains: tuple[Domain, ...] = DOMAINS) -> list[str]:
    """Debian packages that are not installed under `root`, in order."""
    return [
        package
        for domain in domains
        for package, path in domain.packages.items()
        if not any(True for _ in root.glob(path))
    ]


def pieces_of(texts: Iterator[str], *, max_chars: int) -> list[str]:
    """Cut at ends of lines, until there are `max_chars`."""
    pieces: list[str] = []
    num_chars = 0
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= PIECE_CHARS:
                pieces.append("".join(lines))
                lines, size = [], 0
        if lines:
            pieces.append("".join(lines))
        num_chars += len(text)
        if num_chars > 4 * max_chars:  # enough to choose from
            break
    return [piece for piece in pieces if piece.strip()]


def read_domains(
    root: Path, *, seed: int, max_chars: int = DOMAIN_CHARS_MAX, domains: tuple[Domain, ...] = DOMAINS
) -> dict[str, list[str]]:
    """Domain -> its pieces, shuffled, at most about `max_chars` characters."""
    result: dict[str, list[str]] = {}
    for domain in domains:
        pieces = pieces_of(domain.read(root), max_chars=max_chars)
        if not pieces:
            raise RuntimeError(
                f"domain {domain.name!r} has no text under {root}; reinstall {', '.join(domain.packages)}"
            )
        random.Random(f"{seed} {domain.name}").shuffle(pieces)
        kept, num_chars = [], 0
        for piece in pieces:
            if num_chars < max_chars:
                kept.append(piece)
                num_chars += len(piece)
        result[domain.name] = kept
    return result


def split(pieces: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): the first of each HELDOUT_OF pieces, which are in random order, is held out."""
    return [p for i, p in enumerate(pieces) if i % HELDOUT_OF], pieces[::HELDOUT_OF]
