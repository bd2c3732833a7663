"""What the device kernels can compute: `check_supported`, before a model's weights are used there."""

from __future__ import annotations

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.decoder import Decoder
from switchgear_runtime.model.layers import RMSNorm
from switchgear_runtime.model.spec import MoESpec
from switchgear_runtime.moe.layer import MoELayer

HEAD_DIM_MAX = 256
EXPERTS_MAX, TOP_K_MAX = 1024, 32
_SCORINGS = ("softmax", "sigmoid")


def check_supported(decoder: Decoder) -> None:
    """ConfigError names what there is no kernel for."""
    lacking = set()
    for layer in decoder.layers:
        norms = (layer.attention_branch.norm, layer.ffn_branch.norm, decoder.norm)
        if not all(isinstance(norm, RMSNorm) for norm in norms):
            lacking.add("LayerNorm")
        if layer.attention.spec.sinks:
            lacking.add("attention sinks")
        head_dim = layer.attention.spec.head_dim
        if head_dim % 8 or head_dim > HEAD_DIM_MAX:
            lacking.add(f"heads of {head_dim} (only multiples of 8 up to {HEAD_DIM_MAX})")
        if isinstance(layer.ffn, MoELayer):
            lacking |= _of_router(layer.ffn.router.spec)
    if lacking:
        raise ConfigError(f"the device engine has no kernel for {', '.join(sorted(lacking))}; use device='cpu'")


def _of_router(spec: MoESpec) -> set[str]:
    lacking = set()
    if spec.scoring not in _SCORINGS:
        lacking.add(f"router scoring {spec.scoring!r}")
    if spec.num_experts > EXPERTS_MAX or spec.top_k > TOP_K_MAX:
        lacking.add(f"top-k {spec.top_k} of {spec.num_experts} experts (at most {TOP_K_MAX} of {EXPERTS_MAX})")
    return lacking
