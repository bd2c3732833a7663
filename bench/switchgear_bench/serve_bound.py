"""The fastest a machine could run a case: weight and KV bytes over read bandwidth for decode, FLOPs over their peak for prefill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchgear_bench.serve_cases import Case
from switchgear_bench.weight_bytes import WeightBytes
from switchgear_runtime.model.spec import DecoderSpec, load_spec

_WEIGHT_ITEMSIZE = 2  # bf16, of the checkpoint
_KV_ITEMSIZE = 2
# Bytes of a quantised weight: an integer and its scale's share. Router and norms stay bf16, but they are below 1 %.
QUANTISED_BYTES: Mapping[str, float] = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}


def distinct_experts_uniform(num_experts: int, top_k: int, batch_size: int) -> float:
    """Expected under uniform routing.

    >>> distinct_experts_uniform(64, 8, 1)
    8.0
    """
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a case needs at least: of one decode step, or of the whole prefill."""

    bytes_touched: float
    flops: float
    distinct_experts: float | None  # a layer and step

    def bound_tokens_per_s(self, case: Case, bandwidth: float, peak: float) -> float:
        bound_s = max(self.bytes_touched / bandwidth, self.flops / peak)
        return (case.batch_size if case.kind == "decode" else case.num_timed_tokens) / bound_s


class Model:
    """Sizes of a checkpoint that the bounds need."""

    def __init__(self, model_dir: str) -> None:
        self.spec: DecoderSpec = load_spec(model_dir)
        self.weights = WeightBytes.of(model_dir)

    def kv_bytes(self, num_tokens: int) -> int:
        return num_tokens * sum(
            2 * layer.attention.num_kv_heads * layer.attention.head_dim * _KV_ITEMSIZE for layer in self.spec.layers
        )

    def prefill_flops(self, num_tokens: int) -> float:
        """Products only, experts of the chosen alone, causal attention, lm_head for one token."""
        weights, lm_head = self.weights, self.spec.vocab_size * self.spec.hidden_size
        layer_weights = weights.dense / _WEIGHT_ITEMSIZE - lm_head
        layer_weights += weights.experts / _WEIGHT_ITEMSIZE * weights.top_k / weights.num_experts
        pairs = num_tokens * (num_tokens + 1) / 2  # of a query and a key it sees
        attention = sum(4 * pairs * layer.attention.num_heads * layer.attention.head_dim for layer in self.spec.layers)
        return 2 * num_tokens * layer_weights + 2 * lm_head + attention

    def work(self, case: Case, tensor_bytes: Mapping[str, float], distinct_experts: float | None) -> Work:
        """`tensor_bytes`: of `dense` and `experts` in the format that the runtime reads; `distinct_experts`: if measured."""
        weights = self.weights
        if case.kind == "prefill":
            touched = tensor_bytes["dense"] + tensor_bytes["experts"] + self.kv_bytes(case.prompt_tokens)
            return Work(bytes_touched=touched, flops=self.prefill_flops(case.prompt_tokens), distinct_experts=None)
        distinct = distinct_experts or distinct_experts_uniform(weights.num_experts, weights.top_k, case.batch_size)
        context = case.prompt_tokens + (case.new_tokens + 1) / 2  # of the middle step
        touched = tensor_bytes["dense"] + tensor_bytes["experts"] * distinct / weights.num_experts
        touched += self.kv_bytes(1) * case.batch_size * context
        lm_head = 2 * self.spec.vocab_size * self.spec.hidden_size
        step_flops = case.batch_size * (self.prefill_flops(1) - lm_head) + case.batch_size * lm_head
        return Work(bytes_touched=touched, flops=step_flops, distinct_experts=distinct)

    def tensor_bytes(self, precision: str) -> dict[str, float]:
        """As our own formats keep them."""
        share = QUANTISED_BYTES[precision] / _WEIGHT_ITEMSIZE
        return {"dense": self.weights.dense * share, "experts": self.weights.experts * share}


def gguf_tensor_bytes(path: Path) -> dict[str, float]:
    """As to_gguf.py wrote beside a GGUF file."""
    sizes: dict[str, Any] = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    return {"dense": float(sizes["dense"]), "experts": float(sizes["experts"])}
