"""The model card that goes with a trained checkpoint: how it was made, and what was measured on text it never saw."""

from __future__ import annotations

import math
from pathlib import Path

from switchgear_bench.train_bundled.training import ModelSize, Report, TrainingPlan


def write_card(folder: Path, size: ModelSize, plan: TrainingPlan, report: Report) -> None:
    rows = "\n".join(
        f"| {name} | {loss:.3f} | {math.exp(min(loss, 50.0)):.1f} | {report.busiest[name]:.1f} |"
        for name, loss in report.heldout_loss.items()
    )
    text = f"""# Model card: {folder.name}

A {report.num_parameters / 1e6:.1f} M-parameter mixture-of-experts language model in Hugging Face's Qwen3-MoE format (bf16).

| | |
|---|---|
| layers, hidden size | {size.num_layers}, {size.hidden_size} |
| attention | {size.num_heads} heads, {size.num_kv_heads} KV heads, head size {size.head_dim} |
| experts | {size.num_experts} of width {size.expert_ffn}, top-{size.top_k}, renormalised softmax |
| tokenizer | byte-level BPE, {size.vocab_size} tokens |
| context | {plan.row_tokens} tokens in training, position limit {size.max_position_embeddings} |
| training | seed {plan.seed}, {report.num_steps} steps of {plan.batch_size} x {plan.row_tokens} tokens |
| time | {report.hours:.2f} hours on {plan.device} |
| load-balancing coefficient | {plan.balance_coefficient} |

**Use.** A load generator that can spell, not an assistant. Do not use its output for anything that matters.

**Data.** Text that Debian packages and CPython ship (`python -m switchgear_bench.train_bundled --help`). The held-out
text beside this card was never trained on:

| domain | loss (nats per token) | perplexity | busiest expert's load / mean |
|---|---|---|---|
{rows}

**Limits.** It invents facts, loops, and carries whatever its sources carry.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
