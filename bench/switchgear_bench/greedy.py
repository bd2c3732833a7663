"""The sampling of benchmarks that drive an engine without a server: `greedy`."""

from __future__ import annotations

from switchgear_runtime.messages import WireSampling


def greedy(max_tokens: int, seed: int = 0) -> WireSampling:
    """Exactly `max_tokens`, each the likeliest; no stop token ends it."""
    return WireSampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias={},
        stop_token_ids=(),
        max_tokens=max_tokens,
        min_tokens=0,
        logprobs=None,
        seed=seed,
    )
