"""The fused mixture of experts in Triton, as a peer of `bench gpu`: `TritonMoe`, at the best of its tile configurations.

CONFIGS are facts: what vLLM measured as best on an H200 for bf16 experts of Qwen3-30B-A3B's shape, by number of tokens
(fused_moe/configs/E=128,N=768,device_name=NVIDIA_H200.json). It has none for all 256 experts of DeepSeek-V3 in bf16, nor
has SGLang, so each number of tokens tries its own and its neighbours', on either shape, and keeps the fastest.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.gpu_clock import Clock
from switchgear_bench.gpu_layer import Layer, Routing

_CHUNK, _BLOCKS, _COLUMNS = 1024, 64, 1024


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


CONFIGS = {
    1: Config(16, 64, 64, 1, 4, 5),
    2: Config(16, 64, 64, 1, 4, 4),
    4: Config(16, 64, 128, 16, 4, 2),
    8: Config(16, 64, 128, 1, 4, 3),
    16: Config(16, 64, 256, 1, 4, 2),
    32: Config(16, 64, 128, 16, 4, 2),
    64: Config(16, 256, 128, 1, 8, 2),
    128: Config(16, 128, 128, 1, 4, 2),
    256: Config(32, 256, 128, 16, 4, 2),
    512: Config(64, 128, 64, 1, 4, 3),
    1024: Config(128, 256, 64, 16, 8, 4),
    2048: Config(128, 256, 64, 1, 8, 4),
    4096: Config(128, 256, 64, 16, 8, 4),
}


def is_here() -> bool:
    return find_spec("triton") is not None


def candidates(num_tokens: int) -> list[Config]:
    """Its size's and its neighbours'."""
    sizes = sorted(CONFIGS)
    nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - num_tokens))
    found = [CONFIGS[sizes[i]] for i in (nearest, nearest - 1, nearest + 1) if 0 <= i < len(sizes)]
    return list(dict.fromkeys(found))


class TritonMoe:
    """Of one layer. bf16 between products and at the end, as vLLM's."""

    name = "triton fused moe"

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._router_ED = layer.router_ED.bfloat16()
        self.config = CONFIGS[1]

    def tune(self, routing: Routing, clock: Clock) -> None:
        """Those that need more than the device has are left out."""
        seconds: dict[Config, float] = {}
        for config in candidates(routing.x_TD.shape[0]):
            self.config = config
            try:
                series = clock.series([lambda: self(routing)])
                seconds[config] = min(clock.seconds(series, 3) for _ in range(3))
            except Exception as error:  # noqa: BLE001 - Triton's OutOfResources and what its compiler raises
                print(f"  {self.name}: {config} does not run: {type(error).__name__}")
        if not seconds:
            raise RuntimeError(f"none of Triton's configurations runs for {routing.x_TD.shape[0]} tokens")
        self.config = min(seconds, key=lambda config: seconds[config])

    def __call__(self, routing: Routing) -> Tensor:
        return self._experts(routing.x_TD, routing.ids_TK, routing.weights_TK)

    def routed(self, routing: Routing) -> Tensor:
        """With the router: torch's product, then softmax and the choice in one launch."""
        from switchgear_bench.triton_kernels import softmax_topk

        shape, num_tokens = self._layer.shape, routing.x_TD.shape[0]
        logits_TE = functional.linear(routing.x_TD, self._router_ED)
        weights_TK = torch.empty(num_tokens, shape.top_k, device=logits_TE.device)
        ids_TK = torch.empty(num_tokens, shape.top_k, dtype=torch.int32, device=logits_TE.device)
        softmax_topk[(num_tokens,)](logits_TE, weights_TK, ids_TK, shape.num_experts, shape.top_k)
        return self._experts(routing.x_TD, ids_TK, weights_TK)

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        from switchgear_bench import triton_kernels as kernels

        shape, num_tokens = self._layer.shape, x_TD.shape[0]
        num_pairs, device = ids_TK.numel(), x_TD.device
        sorted_rows, expert_of_block, num_padded = self._plan(ids_TK)
        gate_up = torch.empty(num_pairs, 2 * shape.ffn, dtype=x_TD.dtype, device=device)
        act = torch.empty(num_pairs, shape.ffn, dtype=x_TD.dtype, device=device)
        rows = torch.empty(num_pairs, shape.hidden, dtype=x_TD.dtype, device=device)
        out = torch.empty_like(x_TD)
        plan = (weights_TK, sorted_rows, expert_of_block, num_padded, num_pairs)
        self._product(x_TD, self._layer.w13_EXD, gate_up, plan, divisor=shape.top_k, is_weighted=False)
        kernels.silu_mul[(num_pairs, -(-shape.ffn // _COLUMNS))](gate_up, act, shape.ffn, _COLUMNS)
        self._product(act, self._layer.w2_EDF, rows, plan, divisor=1, is_weighted=True)
        grid = (num_tokens, -(-shape.hidden // _COLUMNS))
        kernels.sum_pairs[grid](rows, out, shape.hidden, shape.top_k, _COLUMNS)
        return out

    def _plan(self, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows in order of experts, the expert of each block of them, how many rows there are with padding)."""
        from switchgear_bench.triton_kernels import place_pairs, plan_at_once, plan_blocks

        num_pairs, num_experts, block_m = ids_TK.numel(), self._layer.shape.num_experts, self.config.block_m
        max_padded = -(-num_pairs // block_m) * block_m + min(num_pairs, num_experts) * block_m
        max_blocks = max_padded // block_m
        sizes = (max_padded, max_blocks, 1, num_experts, num_experts)
        sorted_rows, expert_of_block, num_padded, cursor, ends = (
            torch.empty(size, dtype=torch.int32, device=ids_TK.device) for size in sizes
        )
        if num_pairs <= _CHUNK:
            places = (ids_TK, cursor, sorted_rows, expert_of_block, num_padded)
            plan_at_once[(1,)](*places, num_pairs, max_padded, num_experts, block_m, _CHUNK, _BLOCKS)
            return sorted_rows, expert_of_block, num_padded
        grid = (1 + -(-max_padded // _CHUNK),)
        arguments = (num_pairs, max_padded, num_experts, block_m, _CHUNK)
        plan_blocks[grid](ids_TK, cursor, ends, sorted_rows, num_padded, *arguments)
        grid = (-(-num_pairs // _CHUNK) + -(-max_blocks // _BLOCKS),)
        arguments = (num_pairs, max_blocks, num_experts, block_m, _CHUNK)
        place_pairs[grid](ids_TK, cursor, ends, sorted_rows, expert_of_block, *arguments, _BLOCKS)
        return sorted_rows, expert_of_block, num_padded

    def _product(
        self,
        x: Tensor,
        weights: Tensor,
        y: Tensor,
        plan: tuple[Tensor, Tensor, Tensor, Tensor, int],
        *,
        divisor: int,
        is_weighted: bool,
    ) -> None:
        from switchgear_bench.triton_kernels import grouped_product

        config, (num_out, num_k) = self.config, weights.shape[1:]
        num_blocks = plan[2].numel() * -(-num_out // config.block_n)
        grouped_product[(num_blocks,)](
            x,
            weights,
            y,
            *plan,
            num_out,
            num_k,
            DIVISOR=divisor,
            IS_WEIGHTED=is_weighted,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
