"""One runtime behind JSON lines on stdin and stdout: `python worker.py ADAPTER MODEL SETTINGS`, standard library only.

It runs in the environment of the runtime it loads, by path, so it imports nothing of ours. The first answer says what was
loaded; then each request line is a case and each answer what was measured. End of input ends it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol


class Runtime(Protocol):
    """What an adapter's `load(model, settings)` returns. `version` and `settings` are for the record."""

    version: str
    settings: dict[str, Any]

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """A case: `kind`, `prompts` (token ids) and `new_tokens`, those after the first. The answer: `prefill_s` until
        every prompt has its first token, `decode_s` for the rest, `num_prompt_tokens`, `num_tokens` and `tokens` made, and
        perhaps `num_tokens_early`: those after a first one that came before `decode_s` began."""
        ...

    def close(self) -> None: ...


def load(adapter: str, model: str, settings: dict[str, Any]) -> Runtime:
    """By file, not by name: the packages of this environment come first, and none of them is shadowed by a file of ours."""
    path = Path(__file__).with_name(f"{adapter}.py")
    spec = importlib.util.spec_from_file_location(f"adapter_{adapter}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    runtime: Runtime = module.load(model, settings)
    return runtime


def main() -> None:
    adapter, model, settings = sys.argv[1:4]
    own_folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != own_folder]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not speak in our name

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    runtime = load(adapter, model, json.loads(settings))
    try:
        answer({"version": runtime.version, "settings": runtime.settings})
        for line in sys.stdin:
            answer(runtime.run(json.loads(line)))
    finally:
        runtime.close()


if __name__ == "__main__":
    main()
