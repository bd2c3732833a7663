"""Our own side of the comparison: `LLM.generate` with token-id prompts, as any user calls it."""

from __future__ import annotations

import time
from typing import Any

from switchgear import LLM, SamplingParams
from switchgear_bench.rank_affinity import pin_ranks


class Switchgear:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        from importlib.metadata import version

        self.version = version("switchgear")
        self.settings = settings
        self._llm = LLM(model, **settings, bind_cpus=False)
        pin_ranks(self._llm, settings.get("num_threads", 1))

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        if case["kind"] == "expert_rows":  # computed since the start, [rank][layer][expert]
            return {"rows": self._llm.expert_load().rows}
        params = SamplingParams(max_tokens=1 + case["new_tokens"], temperature=0.0, ignore_eos=True)
        start_s = time.perf_counter()
        outputs = self._llm.generate(case["prompts"], params, use_tqdm=False)
        total_s = time.perf_counter() - start_s
        if any(output.num_cached_tokens for output in outputs):
            raise RuntimeError("a prompt came from the prefix cache; its prefill would be a lie")
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        metrics = [output.metrics for output in outputs]
        first_s = max(metric.first_token_s or 0.0 for metric in metrics)
        finished_s = [metric.finished_s or 0.0 for metric in metrics]
        decode_s = max(finished_s) - first_s
        return {
            "num_prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "num_tokens": sum(map(len, tokens)),
            "tokens": tokens,
            "prefill_s": total_s - decode_s,
            "decode_s": decode_s,
            # A prompt that had its first token a step early ends a step early; that step's token is not within decode_s.
            "num_tokens_early": sum(max(finished_s) - one_s for one_s in finished_s) / decode_s * case["new_tokens"]
            if case["new_tokens"]
            else 0.0,
        }

    def close(self) -> None:
        self._llm.close()


def load(model: str, settings: dict[str, Any]) -> Switchgear:
    return Switchgear(model, settings)
