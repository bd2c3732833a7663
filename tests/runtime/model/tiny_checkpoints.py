"""Tiny random checkpoints of every architecture, made with Transformers and cached per process; and ranks as threads.

model_dir = make_checkpoint(tmp_root, "qwen3_moe", seed=3, tie_word_embeddings=True)
results = run_ranks(4, lambda rank, transport: ...)
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from switchgear_runtime.batch import Batch, ScheduledSequence
from switchgear_runtime.comm.loopback import LoopbackHub
from switchgear_runtime.comm.transport import Transport
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.messages import WireSampling
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.sequence import Sequence as TokenSequence
from switchgear_runtime.system import RealSystem

Result = TypeVar("Result")
BUNDLED = Path(__file__).parents[3] / "cluster" / "switchgear" / "bundled" / "tiny-moe"
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "vocab_size": 151, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 512,
    },
    "mixtral": {
        "vocab_size": 137, "hidden_size": 40, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "vocab_size": 151, "hidden_size": 40, "intermediate_size": 36, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    },
    "olmoe": {
        "vocab_size": 139, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 512,
    },
    "flex_olmo": {
        "vocab_size": 139, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "pad_token_id": 1,
    },
    "granitemoe": {
        "vocab_size": 149, "hidden_size": 48, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 512,
        "embedding_multiplier": 12, "attention_multiplier": 0.15, "residual_multiplier": 0.22, "logits_scaling": 0.6,
    },
    "phimoe": {
        "vocab_size": 143, "hidden_size": 40, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2,
    },
}  # fmt: skip
ARCHITECTURES = {
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "olmoe": "Olmoe",
    "flex_olmo": "FlexOlmo",
    "granitemoe": "GraniteMoe",
    "phimoe": "Phimoe",
}


@cache
def _transformers() -> Any:
    """The module, quietly: it warns and logs at import and at save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only wait for each other in models so small
    return transformers


def make_checkpoint(
    root: Path,
    arch: str,
    seed: int,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    std: float = 0.2,
    **overrides: Any,
) -> Path:
    """A directory under `root` with a random model, the same for the same arguments; made once.

    `std` is ten times the usual width, so that routers decide, attention looks somewhere and logits differ.
    """
    key = json.dumps([arch, seed, dtype, max_shard_size, std, overrides], sort_keys=True)
    model_dir = root / f"{arch}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (model_dir / "config.json").exists():
        return model_dir
    transformers = _transformers()
    config_class = getattr(transformers, ARCHITECTURES[arch] + "Config")
    model_class = getattr(transformers, ARCHITECTURES[arch] + "ForCausalLM")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = config_class(**(SIZES[arch] | {"initializer_range": std} | overrides))
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):  # not all ones, or a norm could be skipped unseen
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, 0.0, std)
        model.to(getattr(torch, dtype)).save_pretrained(model_dir, max_shard_size=max_shard_size)
    return model_dir


def reference_model(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' own, with eager attention and eager experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _transformers().AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """[T, V], fp32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()
    return logits


def run_ranks(world_size: int, fn: Callable[[int, Transport], Result], *, timeout_s: float = 120.0) -> list[Result]:
    """Call `fn(rank, transport)` on a thread per rank over one LoopbackHub; their results by rank. The first error is
    raised, after it aborted the others."""
    system = RealSystem(seed=0)
    hub = LoopbackHub(world_size, system)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        transport = hub.transport(rank)
        try:
            results[rank] = fn(rank, transport)
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            errors.append(error)
            transport.abort(f"rank {rank}: {error}")

    tasks = [system.spawn(f"rank-{rank}", lambda rank=rank: run(rank)) for rank in range(world_size)]  # type: ignore[misc]
    ended = [task.join(timeout_s) for task in tasks]
    if errors:
        raise errors[0]
    assert all(ended), f"ranks {[rank for rank, end in enumerate(ended) if not end]} hang"
    return [results[rank] for rank in range(world_size)]


def sampling(max_tokens: int = 1 << 20) -> WireSampling:
    return WireSampling(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
        repetition_penalty=1.0, logit_bias={}, stop_token_ids=(), max_tokens=max_tokens, min_tokens=0, logprobs=None,
        seed=0,
    )  # fmt: skip


def make_sequence(token_ids: Sequence[int], block_table: Sequence[int]) -> TokenSequence:
    return TokenSequence(
        sequence_id=0,
        incarnation=0,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=sampling(),
        block_table=array("i", block_table),
    )


def make_runner(
    model_dir: Path, *, rank: int = 0, world_size: int = 1, native: bool = True, **overrides: Any
) -> ModelRunner:
    settings: dict[str, Any] = {"num_kv_blocks": 64, "max_num_batched_tokens": 512, "max_num_seqs": 64} | overrides
    checkpoint = Checkpoint(model_dir)
    config = EngineConfig(model=str(model_dir), **settings)
    return ModelRunner(config, checkpoint.spec, checkpoint, rank=rank, world_size=world_size, native=native)


def contiguous_map(runner: ModelRunner) -> ExpertMap:
    return ExpertMap.contiguous(runner.spec.num_moe_layers, runner.spec.num_experts, runner.world_size)


def compute(runner: ModelRunner, sequence: TokenSequence, start: int, num_tokens: int) -> torch.Tensor:
    """One step over one slice of one sequence; logits [V] after its last token."""
    batch = Batch((ScheduledSequence(sequence, start, num_tokens, True),))
    logits = runner.forward(batch)
    assert logits.shape == (1, runner.spec.vocab_size)
    return logits[0]


def all_logits(runner: ModelRunner, token_ids: Sequence[int], block_table: Sequence[int]) -> torch.Tensor:
    """[T, V] by one prefill: every token is an entry that samples, all of them one sequence."""
    sequence = make_sequence(token_ids, block_table)
    return runner.forward(Batch(tuple(ScheduledSequence(sequence, t, 1, True) for t in range(len(token_ids)))))
