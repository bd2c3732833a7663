"""Transformers as a peer: its model class with a KV cache, one forward a step, in inference mode."""

from __future__ import annotations

import time
from typing import Any


class Transformers:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(settings["num_threads"])
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        self.settings = settings
        self._torch = torch
        auto: Any = transformers.AutoModelForCausalLM  # untyped
        self._model = auto.from_pretrained(
            model,
            dtype=getattr(torch, settings["dtype"]),
            local_files_only=True,
            experts_implementation=settings["prefill_experts"],
            attn_implementation="sdpa",
        )
        self._model.eval()
        self._experts = settings["prefill_experts"]

    def _use_experts(self, implementation: str) -> None:
        if implementation != self._experts:
            self._model.set_experts_implementation(implementation)
            self._experts = implementation

    def _distinct_experts(self, prompts: list[list[int]], num_steps: int) -> float:
        """Experts chosen in a decode step of the batch, mean over layers and steps: what the bytes of a step follow from."""
        counts: list[int] = []

        def count(_module: Any, _arguments: Any, output: Any) -> None:
            counts.append(output[-1].unique().numel())  # the router's (logits, weights, ids)

        gates = [module for name, module in self._model.named_modules() if name.endswith("mlp.gate")]
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            hooks = [gate.register_forward_hook(count) for gate in gates]
            for _ in range(num_steps):
                last_B1 = out.logits[:, -1:].argmax(-1)
                out = self._model(last_B1, past_key_values=out.past_key_values, use_cache=True)
            for hook in hooks:
                hook.remove()
        return sum(counts) / len(counts)

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        if case["kind"] == "routing":
            return {"distinct_experts": self._distinct_experts(case["prompts"], case["new_tokens"])}
        torch, model, prompts = self._torch, self._model, case["prompts"]
        by_batch = self.settings["decode_experts"]
        decode_experts = by_batch.get(str(len(prompts)), by_batch["default"])
        with torch.inference_mode():
            self._use_experts(self.settings["prefill_experts"])
            start_s = time.perf_counter()
            out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            last_B1 = out.logits[:, -1:].argmax(-1)
            steps = [last_B1]
            prefill_s = time.perf_counter() - start_s
            self._use_experts(decode_experts)
            start_s = time.perf_counter()
            for _ in range(case["new_tokens"]):
                out = model(last_B1, past_key_values=out.past_key_values, use_cache=True)
                last_B1 = out.logits[:, -1:].argmax(-1)
                steps.append(last_B1)
            tokens = torch.cat(steps, dim=1).tolist()
            decode_s = time.perf_counter() - start_s
        return {
            "num_prompt_tokens": sum(map(len, prompts)),
            "num_tokens": sum(map(len, tokens)),
            "tokens": tokens,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
        }

    def close(self) -> None:
        """Nothing outlives the process."""


def load(model: str, settings: dict[str, Any]) -> Transformers:
    return Transformers(model, settings)
