"""lm-eval's `local-completions`, unchanged, on a task made on the spot: contexts with several continuations each.

Run in an environment with `lm-eval[api]`: `python lm_eval_task.py URL MODEL SAMPLES.json`. It needs neither torch nor a
local tokenizer: lm-eval finds /tokenizer_info and /tokenize.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="lm-eval-"))

import lm_eval
from lm_eval.tasks import TaskManager

CONTEXTS = [
    "The king said unto the people,",
    "In the beginning God created",
    "def main(argv: list[str]) -> int:\n    for name in",
    "#include <stdio.h>\n\nint main(void)\n{\n\treturn",
    "harbor (noun): a place where ships",
    "7 * 8 =",
    "Der Benutzer kann die Datei",
    "Le programme affiche",
    "The driver must free the buffer before it",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self",
    "El archivo no",
    "And it came to pass in those days, that there went out a decree " * 12 + "from",
]
CONTINUATIONS = [
    " the earth",
    " 56",
    " argv[1:]:",
    " kann",
    " naïve café — 😀",
    "\n\n",
    " of the LORD.",
    "\nAnd",
    " is a",
    " him",
    " the\n",
]


def main() -> int:
    url, model, samples_path = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "documents.jsonl"
        data.write_text(
            "".join(json.dumps({"context": one, "choices": CONTINUATIONS, "answer": 0}) + "\n" for one in CONTEXTS)
        )
        task: dict[str, Any] = {
            "task": "continuations",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": model,
                "base_url": f"{url}/v1/completions",
                "num_concurrent": 4,
                "max_retries": 1,
                "tokenized_requests": True,
            },
            tasks=[task],
            task_manager=TaskManager(),
            log_samples=True,
            bootstrap_iters=0,
        )
    assert results is not None
    samples = [
        {"context": arguments["arg_0"], "continuation": arguments["arg_1"], "loglikelihood": float(answer[0]),
         "is_greedy": bool(answer[1])}
        for sample in results["samples"]["continuations"]
        for arguments, answer in _answers(sample)
    ]  # fmt: skip
    versions = {"lm_eval": lm_eval.__version__}
    Path(samples_path).write_text(json.dumps({"versions": versions, "samples": samples}, indent=1) + "\n")
    print(f"{len(samples)} loglikelihoods")
    return 0


def _answers(sample: dict[str, Any]) -> list[tuple[dict[str, str], tuple[float, bool]]]:
    """Each choice's arguments beside its answer."""
    arguments = [dict(zip(("arg_0", "arg_1"), one, strict=False)) for one in sample["arguments"]]
    answers = [one[0] if isinstance(one[0], (list, tuple)) else one for one in sample["resps"]]
    return list(zip(arguments, answers, strict=True))


if __name__ == "__main__":
    sys.exit(main())
