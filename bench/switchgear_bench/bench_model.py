"""Write the random checkpoint that runtimes are compared on: `python -m switchgear_bench.bench_model OUT_DIR`.

A Qwen3-MoE of 702 M parameters in bf16 (1.4 GB): small enough for a laptop, far beyond any cache, with the 64 fine experts
and top-8 of its big relatives. Always the same weights. Its tokenizer exists for runtimes that insist on one.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCAB_SIZE = 32_000
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, END_ID = 0, 2
SEED = 0


def model_config() -> dict[str, Any]:
    """The keywords of `transformers.Qwen3MoeConfig`."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,  # of dense layers; this model has none
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": PAD_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
    }


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def write_tokenizer(out: Path) -> None:
    """Byte-level BPE, trained on the standard library's source: text at hand everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    end, pad = SPECIAL_TOKENS[END_ID], SPECIAL_TOKENS[PAD_ID]
    wrapper: Any = PreTrainedTokenizerFast  # untyped
    wrapper(tokenizer_object=tokenizer, eos_token=end, pad_token=pad).save_pretrained(out)


def write_model(out: Path, **changes: Any) -> None:
    """`changes` of the config are for tests, which want a smaller one."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # or initialising takes twice the memory
    try:
        torch.manual_seed(SEED)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**model_config(), **changes})).save_pretrained(out)
    finally:
        torch.set_default_dtype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m switchgear_bench.bench_model", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out)
    write_model(out)


if __name__ == "__main__":
    main()
