"""Transformers as the oracle: fp32 logits within 1e-4 and equal greedy tokens, for every architecture and the bundled
model.

One forward of Transformers over prompt + our greedy tokens proves all of them at once: each must be the argmax after
its prefix.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import (
    BUNDLED,
    compute,
    contiguous_map,
    make_checkpoint,
    make_runner,
    make_sequence,
    reference_logits,
    reference_model,
    run_ranks,
)
from tokenizers import Tokenizer

from switchgear_runtime.model_runner import ModelRunner

NUM_GREEDY = 12
LOGIT_TOLERANCE = 1e-4
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0], "num_hidden_layers": 3}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "num_key_value_heads": 1, "rope_theta": 500.0}),
    ("qwen3_moe", {"hidden_size": 37, "head_dim": 10, "moe_intermediate_size": 13, "vocab_size": 73, "num_experts": 7,
                   "num_experts_per_tok": 7}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 21}),
    ("mixtral", {}),
    ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 4, "num_experts_per_tok": 1}),
    ("mixtral", {"sliding_window": 16, "head_dim": 22}),
    ("mixtral", {"sliding_window": 1, "rms_norm_eps": 1e-3}),
    ("mixtral", {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6,
                 "intermediate_size": 17, "vocab_size": 65, "num_local_experts": 3}),
    ("mixtral", {"dtype": "bfloat16", "max_shard_size": "30KB"}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [1], "num_hidden_layers": 3,
                   "shared_expert_intermediate_size": 13, "hidden_size": 44, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "moe_intermediate_size": 17}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 19,
                   "max_window_layers": 2, "tie_word_embeddings": True}),
    ("olmoe", {}),
    ("olmoe", {"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True, "hidden_size": 36, "num_experts": 7,
               "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 19, "vocab_size": 141}),
    ("flex_olmo", {}),
    ("flex_olmo", {"num_experts_per_tok": 5, "tie_word_embeddings": True, "attention_bias": True,
                   "norm_topk_prob": True, "head_dim": 6, "hidden_size": 37, "rope_theta": 1e4}),
    ("granitemoe", {}),
    ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True, "hidden_size": 46, "intermediate_size": 15, "head_dim": 10,
                    "num_local_experts": 9, "num_experts_per_tok": 8, "num_key_value_heads": 4,
                    "logits_scaling": 3.0}),
    ("phimoe", {}),
    ("phimoe", {"attention_bias": False, "lm_head_bias": False, "sliding_window": 18, "hidden_size": 36,
                "num_attention_heads": 6, "num_key_value_heads": 3, "router_jitter_noise": 0.01,
                "num_local_experts": 2}),
    ("phimoe", {"tie_word_embeddings": True, "head_dim": 14, "hidden_size": 33, "vocab_size": 67,
                "intermediate_size": 18}),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def reference(model_dir: Path) -> Any:
    return reference_model(model_dir)


def check_greedy(runner: ModelRunner, model: Any, prompt: list[int], label: str) -> None:
    """Prefill in one step, then decode; compare the logits of every step and the token they choose."""
    num_blocks = (len(prompt) + NUM_GREEDY) // 16 + 1
    sequence = make_sequence(prompt, random.Random(len(prompt)).sample(range(runner.num_kv_blocks), num_blocks))
    rows = [compute(runner, sequence, 0, len(prompt))]
    for _ in range(NUM_GREEDY):
        sequence.token_ids.append(int(rows[-1].argmax()))
        rows.append(compute(runner, sequence, len(sequence.token_ids) - 1, 1))
    ours = torch.stack(rows)
    theirs = reference_logits(model, sequence.token_ids)[len(prompt) - 1 :]
    assert theirs.argmax(-1)[:-1].tolist() == sequence.token_ids[len(prompt) :], label
    worst = float((ours - theirs).abs().max())
    assert worst < LOGIT_TOLERANCE, f"{label}: logits differ by {worst}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("arch", "overrides"), VARIANTS, ids=lambda value: str(value))
def test_tiny_checkpoints(root: Path, arch: str, overrides: dict[str, Any], seed: int) -> None:
    model_dir = make_checkpoint(root, arch, seed, **overrides)
    lengths = [1, random.Random(f"{arch}{overrides}{seed}").randint(2, 120)] + ([300] if seed == 0 else [])

    def run(_rank: int, transport: Any) -> None:
        runner = make_runner(model_dir, dtype="float32")
        runner.begin(transport, contiguous_map(runner))
        for length in lengths:
            prompt = torch.randint(runner.spec.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
            check_greedy(
                runner, reference(model_dir), prompt.tolist(), f"{arch} {overrides} seed={seed} length={length}"
            )

    run_ranks(1, run)


TEXTS = {
    "prose": "The old clock in the hall struck nine, and nobody in the house remembered winding it. ",
    "code": "def main(argv: list[str]) -> int:\n    for name in argv[1:]:\n        print(name)\n    return 0\n\n",
    "french": "Il était une fois, dans une petite ville près de la mer, un horloger qui ne savait pas lire l'heure. ",
}


@pytest.mark.parametrize("text", sorted(TEXTS))
def test_the_bundled_model(text: str) -> None:
    token_ids = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(TEXTS[text] * 12).ids

    def run(_rank: int, transport: Any) -> None:
        runner = make_runner(BUNDLED, dtype="float32")
        runner.begin(transport, contiguous_map(runner))
        for length in (1, 47, 300):
            assert len(token_ids) >= length
            check_greedy(runner, reference(BUNDLED), token_ids[:length], f"{text} length={length}")

    run_ranks(1, run)
