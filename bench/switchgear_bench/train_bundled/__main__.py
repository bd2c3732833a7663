"""Makes a small MoE model from Debian's text packages: `python -m switchgear_bench.train_bundled OUT [--hours 2]`.

OUT becomes a checkpoint that `switchgear serve OUT` serves, with tokenizer, model card and held-out text. The bundled
model was made this way: two hours on two CPU cores. Needs torch and transformers (the dev extra), and Debian's
bible-kjv bible-kjv-text fortunes wordnet-base linux-doc-6.1 linux-libc-dev manpages-de manpages-fr manpages-es
fortunes-de fortunes-es; it names those that are missing. The same seed, text, number of steps and torch give the same
model on the same kind of processor; --hours alone stops wherever the time is up.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from switchgear_bench.train_bundled.card import write_card
from switchgear_bench.train_bundled.corpus import DOMAINS, missing_packages, read_domains, split
from switchgear_bench.train_bundled.tokenizer import save_tokenizer, train_tokenizer
from switchgear_bench.train_bundled.training import ModelSize, Rows, TrainingPlan, encode, evaluate, make_model, train


def add_fields(parser: argparse.ArgumentParser, config: ModelSize | TrainingPlan) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(value), default=value, help=f"default: {value}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_bundled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the checkpoint; must be empty or new")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where Debian's files are (default: /)")
    parser.add_argument("--domains", help="comma-separated; default: all of " + ",".join(d.name for d in DOMAINS))
    parser.add_argument("--max-chars", type=int, default=6_000_000, help="of each domain (default: 6000000)")
    add_fields(parser, ModelSize())
    add_fields(parser, TrainingPlan())
    arguments = parser.parse_args(argv)
    wanted = arguments.domains.split(",") if arguments.domains else [domain.name for domain in DOMAINS]
    if unknown := set(wanted) - {domain.name for domain in DOMAINS}:
        parser.error(f"there is no domain {', '.join(sorted(unknown))}")
    domains = tuple(domain for domain in DOMAINS if domain.name in wanted)
    if missing := missing_packages(arguments.root, domains):
        parser.error(f"text is missing; apt-get install {' '.join(missing)} (or leave domains out with --domains)")
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    size = ModelSize(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ModelSize)})
    plan = TrainingPlan(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(TrainingPlan)})

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    pieces = read_domains(arguments.root, seed=plan.seed, max_chars=arguments.max_chars, domains=domains)
    splits = {name: split(of_domain) for name, of_domain in pieces.items()}
    for name, (training, heldout) in splits.items():
        say(f"{name}: {sum(map(len, training))} characters to train on, {sum(map(len, heldout))} held out")
    tokenizer = train_tokenizer((piece for training, _ in splits.values() for piece in training), size.vocab_size)
    size = dataclasses.replace(size, vocab_size=tokenizer.get_vocab_size())  # fewer, if the text has no more to merge
    rows = Rows({name: encode(tokenizer, split_[0]) for name, split_ in splits.items()}, plan.row_tokens, plan.seed)
    model = make_model(size, plan)
    report = train(model, rows, plan, say)
    model.to(torch.bfloat16)
    evaluate(model, {name: encode(tokenizer, split_[1]) for name, split_ in splits.items()}, plan, report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out, size.max_position_embeddings)
    write_card(arguments.out, size, plan, report)
    (arguments.out / "heldout").mkdir()
    for name, (_, heldout) in splits.items():
        (arguments.out / "heldout" / f"{name}.txt").write_text("\n".join(heldout), encoding="utf-8")
    say(f"{arguments.out}: {report.num_parameters / 1e6:.1f} M parameters after {report.num_steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
