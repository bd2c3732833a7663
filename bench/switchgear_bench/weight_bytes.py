"""How many weight bytes a decode step must read, from the checkpoint's headers: the bandwidth bound."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from switchgear_runtime.model.spec import MoESpec, load_spec

_EXPERT = re.compile(r"\.experts\.")
_EMBEDDING = re.compile(r"embed_tokens\.weight$")


def _tensor_bytes(model_dir: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        sizes |= {
            name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"
        }
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Bytes on disk by role. `dense`: read once a step by each rank that has a token (embedding rows aside, lm_head included)."""

    dense: int
    experts: int
    num_experts: int
    top_k: int
    vocab_size: int

    @classmethod
    def of(cls, model_dir: str) -> WeightBytes:
        spec = load_spec(model_dir)
        sizes = _tensor_bytes(Path(model_dir))
        experts = sum(size for name, size in sizes.items() if _EXPERT.search(name))
        embedding = sum(size for name, size in sizes.items() if _EMBEDDING.search(name))
        untied = 0 if spec.tie_word_embeddings else embedding
        moe = next((layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)), None)
        return cls(
            dense=sum(sizes.values()) - experts - untied,
            experts=experts,
            num_experts=moe.num_experts if moe else 1,
            top_k=moe.top_k if moe else 1,
            vocab_size=spec.vocab_size,
        )

    def expert_bytes_touched(self, batch_size: int) -> float:
        """Expected under uniform routing: each token misses an expert with probability 1 - K/E. Skew touches fewer."""
        return self.experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** batch_size)

    def decode_bound_tokens_per_s(self, batch_size: int, num_ranks: int, bandwidth: float) -> float:
        """Tokens per second if reading weights at `bandwidth` bytes/s were all: each rank with a token reads the dense weights itself.

        `bandwidth` is the whole machine's, which ranks of one host share. A model that fits the caches can beat this.
        """
        step_bytes = self.dense * min(num_ranks, batch_size) + self.expert_bytes_touched(batch_size)
        return batch_size * bandwidth / step_bytes
