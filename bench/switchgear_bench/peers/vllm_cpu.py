"""vLLM's CPU build as a peer: its offline `LLM.generate` with token-id prompts, the engine in this process."""

from __future__ import annotations

import time
from typing import Any


class VLLM:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import torch
        import vllm

        self.version = f"{vllm.__version__}, torch {torch.__version__}"
        self.settings = settings
        self._vllm = vllm
        # Statistics are on because they hold the times of first and last token.
        self._llm = vllm.LLM(model, disable_log_stats=False, enable_prefix_caching=False, **settings)

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        params = self._vllm.SamplingParams(max_tokens=1 + case["new_tokens"], ignore_eos=True, temperature=0)
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        start_s = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        total_s = time.perf_counter() - start_s
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        finished_s = [output.metrics.last_token_ts for output in outputs]
        decode_s = max(finished_s) - max(output.metrics.first_token_ts for output in outputs)
        return {
            "num_prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "num_tokens": sum(map(len, tokens)),
            "tokens": tokens,
            "prefill_s": total_s - decode_s,
            "decode_s": decode_s,
            # As for ours: who had its first token a step early ends a step early.
            "num_tokens_early": sum(max(finished_s) - one_s for one_s in finished_s) / decode_s * case["new_tokens"]
            if case["new_tokens"]
            else 0.0,
        }

    def close(self) -> None:
        """The engine is in this process and ends with it."""


def load(model: str, settings: dict[str, Any]) -> VLLM:
    return VLLM(model, settings)
