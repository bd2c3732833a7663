"""llama.cpp as a peer: its own llama-bench (prefill) and llama-batched-bench (decode), one process a turn; standard library only.

Both feed random token ids, so no text is tokenized; the GGUF file is mapped, so a turn's start costs about a second, untimed.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

_TIMEOUT_S = 300.0


class LlamaCpp:
    """`model` is a GGUF file; settings: `binaries`, `num_threads` and flags of the two tools by kind of case."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self._model, self._binaries = model, Path(settings["binaries"])
        self.settings = {name: value for name, value in settings.items() if name != "binaries"}
        self.version = settings["version"]
        self._threads = str(settings["num_threads"])

    def _output(self, tool: str, arguments: list[str]) -> str:
        command = [str(self._binaries / tool), "-m", self._model, "-t", self._threads, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        lengths = {len(prompt) for prompt in case["prompts"]}
        if len(lengths) != 1:
            raise ValueError(f"llama.cpp's tools take prompts of one length, not of {sorted(lengths)}")
        return self._prefill(case, lengths.pop()) if case["kind"] == "prefill" else self._decode(case, lengths.pop())

    def _prefill(self, case: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
        num_prompts = len(case["prompts"])
        if num_prompts != 1 or case["new_tokens"]:
            raise ValueError("a prefill case is one prompt and its first token")
        flags = self.settings["prefill_flags"]
        out = self._output("llama-bench", ["-p", str(prompt_tokens), "-n", "0", "-r", "1", "-o", "json", *flags])
        (row,) = json.loads(out)
        if row["n_prompt"] != prompt_tokens or str(row["n_threads"]) != self._threads:
            raise RuntimeError(f"llama-bench ran something else than asked: {row}")
        return {
            "num_prompt_tokens": row["n_prompt"],
            "num_tokens": 1,
            "tokens": None,
            "prefill_s": row["samples_ns"][0] / 1e9,
            "decode_s": 0.0,
        }

    def _decode(self, case: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
        batch, steps = len(case["prompts"]), case["new_tokens"]
        context = batch * (prompt_tokens + steps)
        arguments = ["-npp", prompt_tokens, "-ntg", steps, "-npl", batch, "-c", context, "--output-format", "jsonl"]
        out = self._output("llama-batched-bench", [*map(str, arguments), *self.settings["decode_flags"]])
        (row,) = [json.loads(line) for line in re.findall(r"^\{.*\}$", out, re.MULTILINE)]
        if (row["pp"], row["tg"], row["pl"], str(row["n_threads"])) != (prompt_tokens, steps, batch, self._threads):
            raise RuntimeError(f"llama-batched-bench ran something else than asked: {row}")
        return {
            "num_prompt_tokens": batch * row["pp"],
            "num_tokens": batch * (1 + row["tg"]),
            "tokens": None,
            "prefill_s": row["t_pp"],
            "decode_s": row["t_tg"],
        }

    def close(self) -> None:
        """No process lasts longer than a turn."""


def load(model: str, settings: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(model, settings)
