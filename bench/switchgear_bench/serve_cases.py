"""What `bench serve` runs on every runtime: prefill of long prompts, decode of small to large batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_FIRST_TOKEN_ID = 3  # below it are special tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Prefill is one prompt until its first token; decode is `new_tokens` more for each prompt of the batch, timed from there.

    >>> CASES["decode-8"].num_timed_tokens
    256
    """

    name: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int  # after the first
    num_repeats: int

    @property
    def kind(self) -> str:
        return "decode" if self.new_tokens else "prefill"

    @property
    def num_timed_tokens(self) -> int:
        return self.batch_size * (self.new_tokens or self.prompt_tokens)

    def request(self, vocab_size: int, seed: int) -> dict[str, Any]:
        """For a worker. Every repetition has fresh prompts, the same for all runtimes."""
        draw = random.Random(seed)
        prompts = [
            [draw.randrange(_FIRST_TOKEN_ID, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.batch_size)
        ]
        return {"kind": self.kind, "prompts": prompts, "new_tokens": self.new_tokens}


CASES = {
    case.name: case
    for case in (
        Case(name="prefill-512", batch_size=1, prompt_tokens=512, new_tokens=0, num_repeats=7),
        Case(name="prefill-2048", batch_size=1, prompt_tokens=2048, new_tokens=0, num_repeats=5),
        Case(name="decode-1", batch_size=1, prompt_tokens=128, new_tokens=64, num_repeats=15),
        Case(name="decode-8", batch_size=8, prompt_tokens=128, new_tokens=32, num_repeats=7),
        Case(name="decode-32", batch_size=32, prompt_tokens=128, new_tokens=32, num_repeats=5),
    )
}
