"""`make demo`: serve the bundled model on four Ray actors, send a mixed batch, show what came out and who computed it.

Then traffic of one kind makes experts hot, and the placement follows (demo_placement.py). The last lines compare every
token with those of a single rank: they are equal, bit for bit, or the demo fails.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from switchgear import LLM, Client, SamplingParams, demo_placement
from switchgear.admin_client import AdminClient
from switchgear.demo_prompts import PROMPTS_BY_DOMAIN
from switchgear.heat_map import heat_map
from switchgear.outputs import RequestOutput

NUM_RANKS = 4
MAX_TOKENS = 48
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
LOAD_REPORT_S = 0.3  # ranks report what their experts did when they park, moments after the last token


@contextmanager
def server(num_ranks: int, *options: str) -> Iterator[str]:
    """`switchgear serve` as a user would start it; yields its URL, stops it with SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "switchgear.cli",
        "serve",
        "--launcher",
        "ray",
        "--ranks",
        str(num_ranks),
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:  # ends when the server does, so a failed start does not hang
            if found := re.search(r"http://\S+", line):
                yield found.group().rstrip("/.")
                break
        else:
            raise SystemExit(f"the server ended with status {process.wait(STOP_TIMEOUT_S)} before it was ready")
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def show(console: Console, domains: list[str], outputs: list[RequestOutput]) -> None:
    table = Table(title="Completions (first of each kind)", title_justify="left", show_lines=True)
    table.add_column("kind")
    table.add_column("prompt")
    table.add_column("completion", overflow="fold")
    seen: set[str] = set()
    for domain, output in zip(domains, outputs, strict=True):
        if domain not in seen:
            seen.add(domain)
            table.add_row(domain, repr(output.prompt)[1:-1], repr(output.outputs[0].text)[1:-1])
    console.print(table)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    console = Console(width=150 if not sys.stdout.isatty() else None)
    domains = [domain for domain, prompts in PROMPTS_BY_DOMAIN.items() for _ in prompts]
    prompts = [prompt for group in PROMPTS_BY_DOMAIN.values() for prompt in group]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)

    console.print(f"Starting Ray and {NUM_RANKS} rank actors ...")
    admin_key = secrets.token_hex(16)
    options = ["--admin-key", admin_key, *demo_placement.OPTIONS]
    with server(NUM_RANKS, *options) as url:
        console.print(f"Serving the bundled model at {url}. Sending {len(prompts)} prompts in one batch.")
        client = Client(url)
        start_s = time.perf_counter()
        outputs = client.generate(prompts, params)
        duration_s = time.perf_counter() - start_s
        time.sleep(LOAD_REPORT_S)
        load = client.expert_load()
        show(console, domains, outputs)
        console.print(heat_map(load.rows))
        num_tokens = sum(len(tokens) for tokens in tokens_of(outputs))
        rate = num_tokens / duration_s
        console.print(
            f"\n{len(outputs)} completions, {num_tokens} tokens in {duration_s:.2f} s: {rate:.0f} tokens/s on "
            f"{NUM_RANKS} ranks."
        )
        with AdminClient(url, admin_key) as admin:
            skewed = demo_placement.follow_the_load(console, client, admin, params)
        client.close()

    console.print("\nThe same batches on one rank ...")
    with LLM(ranks=1, launcher="local") as llm:
        alone = llm.generate(prompts, params, use_tqdm=False)
        skewed_alone = llm.generate(demo_placement.prompts(), params, use_tqdm=False)
    equal = tokens_of(alone) == tokens_of(outputs)
    if not equal or any(batch.tokens != tokens_of(skewed_alone) for batch in skewed):
        raise SystemExit("the tokens of one rank differ from those of four: this is a bug, please report it")
    num_tokens += sum(len(tokens) for batch in skewed for tokens in batch.tokens)
    console.print(
        f"All {num_tokens} tokens are the same, bit for bit, on one rank and on {NUM_RANKS}, before and after the move."
    )


if __name__ == "__main__":
    main()
