"""The model and its training: Transformers' Qwen3-MoE, AdamW, one seed for everything that is drawn.

Letters: B batch, T tokens of a row, N tokens of a domain.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

EVAL_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The defaults are the bundled model's: 14.5 M parameters, 3.4 M active."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    top_k: int = 4
    expert_ffn: int = 128
    max_position_embeddings: int = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """`hours` ends the run if `num_steps` has not; the learning rate follows whichever of the two is nearer its end."""

    seed: int = 0
    num_steps: int = 20_000
    hours: float = 2.0
    batch_size: int = 8
    row_tokens: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    balance_coefficient: float = 0.003  # weak on purpose: experts specialise, so that shifts in traffic move load
    device: str = "cpu"


@dataclass(slots=True)
class Report:
    """What goes into the model card."""

    num_parameters: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    hours: float = 0.0
    heldout_loss: dict[str, float] = field(default_factory=dict)  # domain -> nats per token
    busiest: dict[str, float] = field(default_factory=dict)  # domain -> load of the busiest expert / mean


def encode(tokenizer: Tokenizer, pieces: list[str]) -> Tensor:
    """tokens_N, int32: the pieces one after the other, a token 0 after each."""
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(pieces):
        tokens += encoding.ids
        tokens.append(0)
    return torch.tensor(tokens, dtype=torch.int32)


class Rows:
    """Draws rows: a domain by the square root of its size, then a place in it."""

    def __init__(self, domains: dict[str, Tensor], row_tokens: int, seed: int) -> None:
        self._domains = list(domains.values())
        self._weights = [math.sqrt(len(tokens)) for tokens in self._domains]
        self._row_tokens = row_tokens
        self._rng = random.Random(seed)

    def draw(self, batch_size: int) -> Tensor:
        """token_ids_BT, int64."""
        return torch.stack(
            [self._row(tokens) for tokens in self._rng.choices(self._domains, self._weights, k=batch_size)]
        )

    def _row(self, tokens_N: Tensor) -> Tensor:
        if len(tokens_N) < self._row_tokens:  # a corpus of a few lines: over and over
            tokens_N = tokens_N.repeat(-(-self._row_tokens // len(tokens_N)))
        start = self._rng.randrange(len(tokens_N) - self._row_tokens + 1)
        return tokens_N[start : start + self._row_tokens].long()


def make_model(size: ModelSize, plan: TrainingPlan) -> Any:
    """A Qwen3MoeForCausalLM with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(plan.seed)
    config_class: Any = Qwen3MoeConfig  # its keywords depend on the version
    config = config_class(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        moe_intermediate_size=size.expert_ffn,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        num_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=size.max_position_embeddings,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        router_aux_loss_coef=plan.balance_coefficient,
        output_router_logits=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    return model.to(plan.device)


def learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def train(model: Any, rows: Rows, plan: TrainingPlan, say: Callable[[str], None]) -> Report:
    """Runs the plan; returns a report without the held-out numbers."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=plan.learning_rate,
        betas=(0.9, 0.95),
    )
    report = Report(num_parameters=sum(parameter.numel() for parameter in model.parameters()))
    start_s = time.monotonic()
    model.train()
    for step in range(plan.num_steps):
        elapsed_s = time.monotonic() - start_s
        progress = max(step / plan.num_steps, elapsed_s / (plan.hours * 3600))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step, progress)
        token_ids_BT = rows.draw(plan.batch_size).to(plan.device)
        output = model(input_ids=token_ids_BT, labels=token_ids_BT, output_router_logits=True, use_cache=False)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # with the load-balancing loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report.num_steps = step + 1
        report.num_tokens += token_ids_BT.numel()
        if step % 20 == 0:
            say(f"step {step}: loss {output.loss.item():.3f}, {elapsed_s / 60:.1f} min")
    report.hours = (time.monotonic() - start_s) / 3600
    model.eval()
    return report


@torch.no_grad()
def evaluate(model: Any, heldout: dict[str, Tensor], plan: TrainingPlan, report: Report) -> None:
    """Held-out loss, and how uneven the experts' load is, by domain."""
    for name, tokens_N in heldout.items():
        rows = Rows({name: tokens_N}, plan.row_tokens, plan.seed)
        losses, counts = [], torch.zeros(0)
        for _ in range(EVAL_ROWS):
            token_ids_BT = rows.draw(1).to(plan.device)
            output = model(input_ids=token_ids_BT, output_router_logits=True, use_cache=False)
            logits = output.logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, token_ids_BT[0, 1:]).item())
            chosen = [logits_TE.topk(model.config.num_experts_per_tok).indices for logits_TE in output.router_logits]
            layers = torch.stack([torch.bincount(ids.flatten(), minlength=model.config.num_experts) for ids in chosen])
            counts = layers.float() if counts.numel() == 0 else counts + layers
        report.heldout_loss[name] = sum(losses) / len(losses)
        report.busiest[name] = (counts.amax(-1) / counts.mean(-1)).mean().item()
