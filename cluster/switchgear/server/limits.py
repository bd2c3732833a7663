"""What the server knows of its model and what it allows: `ModelFacts`, `ServerLimits`."""

from __future__ import annotations

from dataclasses import dataclass

from switchgear.config import ServeConfig
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.model.spec import DecoderSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """The few facts of the checkpoint that requests are checked against."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    num_layers: int = 0  # MoE layers
    num_experts: int = 0  # logical, per layer
    top_k: int = 0  # of them that a token takes
    max_num_seqs: int = 64  # what a rank runs at once
    prefix_caching: bool = True

    @classmethod
    def of(cls, spec: DecoderSpec, engine: EngineConfig) -> ModelFacts:
        """Before any rank has loaded the model."""
        return cls(
            vocab_size=spec.vocab_size,
            max_model_len=min(engine.max_model_len or spec.max_position_embeddings, spec.max_position_embeddings),
            eos_token_ids=spec.eos_token_ids,
            num_layers=spec.num_moe_layers,
            num_experts=spec.num_experts,
            top_k=spec.moe.top_k,
            max_num_seqs=engine.max_num_seqs,
            prefix_caching=engine.enable_prefix_caching,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """Each is checked before the request costs anything."""

    max_prompts_per_request: int = 1024
    max_queued: int = 4096  # unfinished sequences in the whole server
    max_body_bytes: int = 8 << 20
    max_total_body_bytes: int = 64 << 20  # of the bodies that are being read
    max_cache_salt_chars: int = 256
    max_unread_logprobs: int = 1 << 18  # of one request whose client is slow: tokens with logprobs, and alternatives

    @classmethod
    def of(cls, config: ServeConfig) -> ServerLimits:
        return cls(
            max_prompts_per_request=config.max_prompts_per_request,
            max_queued=config.max_queued_requests,
            max_body_bytes=config.max_body_bytes,
            max_total_body_bytes=config.max_total_body_bytes,
        )
