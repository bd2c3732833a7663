"""Compares the loglikelihoods that lm-eval got from a server with Transformers' in fp32, on the same token ids.

Run in the development environment: `python lm_eval_reference.py SAMPLES.json MODEL_DIR RESULTS.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

TOLERANCE = 1e-3


@torch.no_grad()
def loglikelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
    chosen = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return float(chosen.sum()), bool((logprobs.argmax(-1) == torch.tensor(continuation)).all())


def main() -> int:
    samples_path, model_dir, results_path = sys.argv[1:]
    samples = json.loads(Path(samples_path).read_text())
    tokenizer = tokenizers.Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    rows = []
    for sample in samples["samples"]:
        context = tokenizer.encode(sample["context"]).ids
        whole = tokenizer.encode(sample["context"] + sample["continuation"]).ids
        expected, is_greedy = loglikelihood(model, context, whole[len(context) :])
        difference = abs(sample["loglikelihood"] - expected)
        same_greedy = is_greedy == sample["is_greedy"]
        rows.append({**sample, "transformers": expected, "difference": difference, "same_greedy": same_greedy})
    worst = max(row["difference"] for row in rows)
    failed = sum(row["difference"] > TOLERANCE or not row["same_greedy"] for row in rows)
    summary = {
        **samples["versions"],
        "transformers": transformers.__version__,
        "num_loglikelihoods": len(rows),
        "worst_difference": worst,
        "tolerance": TOLERANCE,
        "num_failed": failed,
        "num_greedy": sum(row["is_greedy"] for row in rows),
    }
    Path(results_path).write_text(json.dumps({**summary, "samples": rows}, indent=1) + "\n")
    print(f"{len(rows)} loglikelihoods, worst difference {worst:.2e}, {failed} over {TOLERANCE} or not as greedy")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
