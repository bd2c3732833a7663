"""Who runs a layer of experts in `bench gpu`: `OurLayer`, and its peers on the same device with the same weights.

A contender takes a Routing and returns [T, D]; `routed` computes the router's choice, too. The peers: Transformers'
experts with grouped_mm, by Transformers' own function where that is installed, else by an equal of it; and a fused mixture
of experts in Triton (triton_moe.py).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from switchgear_bench.gpu_layer import Layer, Routing
from switchgear_runtime.cuda.kernels import Kernels
from switchgear_runtime.cuda.products import bf16_parts


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, routing: Routing) -> Tensor: ...

    def routed(self, routing: Routing) -> Tensor: ...


class OurLayer:
    """As a rank alone runs it: pairs by slot, two grouped products, the weighted sum in router order."""

    name = "switchgear"

    def __init__(self, kernels: Kernels, layer: Layer) -> None:
        self._kernels = kernels
        self._layer = layer
        self._router_parts = bf16_parts(layer.router_ED)
        self._w13_S, self._w2_S = (
            torch.tensor([w.data_ptr() for w in weights], dtype=torch.int64).to(kernels.device)
            for weights in (layer.w13_EXD, layer.w2_EDF)
        )

    def __call__(self, routing: Routing) -> Tensor:
        return self._experts(routing.x_TD, routing.ids_TK, routing.weights_TK)

    def routed(self, routing: Routing) -> Tensor:
        """By the unrounded input, as the engine: what the experts take is rounded here."""
        kernels = self._kernels
        logits_TE = kernels.exact_linear(routing.h_TD, self._router_parts)
        top_k = self._layer.shape.top_k
        weights_TK, ids_TK = kernels.topk_router(logits_TE, top_k, sigmoid=False, renormalize=True)
        return self._experts(kernels.rounded(routing.h_TD), ids_TK, weights_TK)

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        kernels, shape = self._kernels, self._layer.shape
        groups = kernels.group_local(ids_TK, None, shape.num_experts)
        act_NF = kernels.expert_gated_linear(x_TD, self._w13_S, shape.ffn, groups)
        rows_ND = kernels.expert_linear(act_NF, self._w2_S, shape.hidden, groups)
        return kernels.combine(rows_ND, None, weights_TK)


class _Grouped:
    """What both grouped_mm peers share: Qwen3-MoE's router, in torch."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._router_ED = layer.router_ED.bfloat16()

    def routed(self, routing: Routing) -> Tensor:
        probabilities_TE = functional.linear(routing.x_TD, self._router_ED).softmax(-1, dtype=torch.float32)
        weights_TK, ids_TK = probabilities_TE.topk(self._layer.shape.top_k, -1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return self._experts(routing.x_TD, ids_TK, weights_TK)

    def __call__(self, routing: Routing) -> Tensor:
        return self._experts(routing.x_TD, routing.ids_TK, routing.weights_TK)

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        raise NotImplementedError


class TransformersExperts(_Grouped):
    """Its own Qwen3MoeExperts, with the weights put into it; not one of them is copied."""

    name = "transformers grouped_mm"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        from transformers.models.qwen3_moe import modeling_qwen3_moe
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

        shape = layer.shape
        config = Qwen3MoeConfig(
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.ffn,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            make: Any = modeling_qwen3_moe.Qwen3MoeExperts
            experts = make(config)
        experts.gate_up_proj = torch.nn.Parameter(layer.w13_EXD, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(layer.w2_EDF, requires_grad=False)
        self._module = experts.eval()

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        with torch.no_grad():
            y_TD: Tensor = self._module(x_TD, ids_TK.long(), weights_TK.to(x_TD.dtype))
        return y_TD


class TorchGrouped(_Grouped):
    """Rows in order of experts, two grouped products, rows back, weighted and summed."""

    name = "torch grouped_mm"

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        layer, top_k = self._layer, ids_TK.shape[1]
        sorted_ids_N, order_N = ids_TK.view(-1).sort()
        experts_E = torch.arange(layer.shape.num_experts, device=ids_TK.device, dtype=ids_TK.dtype)
        ends_E = torch.searchsorted(sorted_ids_N, experts_E, right=True, out_int32=True)
        act_NX = _grouped(x_TD.index_select(0, order_N // top_k), layer.w13_EXD, ends_E)
        gate_NF, up_NF = act_NX.chunk(2, -1)
        y_ND = _grouped(functional.silu(gate_NF) * up_NF, layer.w2_EDF, ends_E)
        rows_ND = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND)
        return (rows_ND.view(*ids_TK.shape, -1) * weights_TK.to(rows_ND.dtype)[..., None]).sum(1)


class Unmade:
    """A peer that could not be made: each row names it, with the reason."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self._error = error

    def __call__(self, routing: Routing) -> Tensor:  # noqa: ARG002
        raise self._error

    routed = __call__


def peers(layer: Layer) -> list[Contender]:
    """Those that this machine has; torch's grouped_mm stands for Transformers' experts where these are not to be had."""
    from switchgear_bench import triton_moe

    found: list[Contender] = []
    if find_spec("transformers") is not None:
        found.append(made(TransformersExperts, layer))
    if not found or isinstance(found[0], Unmade):
        found.append(TorchGrouped(layer))
    if layer.w13_EXD.device.type == "cuda" and triton_moe.is_here():
        found.append(made(triton_moe.TritonMoe, layer))
    return found


def made(kind: Callable[[Layer], Contender], layer: Layer) -> Contender:
    try:
        return kind(layer)
    except Exception as error:  # noqa: BLE001 - of whatever version is installed; the rows say it
        name: str = getattr(kind, "name", "a peer")
        return Unmade(name, error)


def _grouped(x_NK: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    if x_NK.device.type == "cuda":
        return torch._grouped_mm(x_NK, weights.transpose(-2, -1), offs=ends_E)
    parts, begin = [], 0
    for weight, end in zip(weights, ends_E.tolist(), strict=True):
        parts.append(x_NK[begin:end] @ weight.T)
        begin = end
    return torch.cat(parts)
