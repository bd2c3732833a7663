"""Every matrix a model is computed with, by name: its format, its shape, and the tensors on disk it is packed from.

The order depends on the model only: it is the table of contents of the weight cache. Imports no torch.

Letters: D hidden, F ffn, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.names import EMBED, SHARED_EXPERT, SHARED_GATE, ExpertNames
from switchgear_runtime.model.spec import DecoderSpec, MoESpec
from switchgear_runtime.moe.expert_map import EMPTY, ExpertMap
from switchgear_runtime.packing import packed_bytes
from switchgear_runtime.weight_format import Kind, weight_format

EMBEDDING = "embedding"
ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """[num_out, num_k], packed. `gate_up`: gates, then as many ups. The embedding alone lies by rows, not packed."""

    name: str
    kind: Kind
    format: str
    num_out: int
    num_k: int
    gate_up: bool = False
    tensors: tuple[str, ...] = ()  # on disk, stacked by rows
    expert: tuple[int, int] | None = None  # (decoder layer, logical expert), which the checkpoint reads by itself

    @property
    def num_bytes(self) -> int:
        if self.name == EMBEDDING:
            return self.num_out * self.num_k * (4 if self.format == "f32" else 2)
        return packed_bytes(self.format, self.num_out, self.num_k, gate_up=self.gate_up)


def run_quantization(spec: DecoderSpec, quantization: str) -> str:
    """What the weights are kept in: the setting, or what the checkpoint has them in. ConfigError where they differ."""
    if spec.quantization in (None, quantization):
        return quantization
    if quantization == "none":
        return str(spec.quantization)
    raise ConfigError(
        f"quantization={quantization!r}: the checkpoint's weights are {spec.quantization} already; leave it out, or give "
        "a checkpoint in bfloat16"
    )


def expert_matrix_names(layer: int, expert: int) -> tuple[str, str]:
    """(gate and up, down) of one logical expert of decoder layer `layer`."""
    return f"layers.{layer}.experts.{expert}.gate_up", f"layers.{layer}.experts.{expert}.down"


def matrices(
    spec: DecoderSpec, names: ExpertNames, *, lm_head: str, dtype: str, quantization: str
) -> dict[str, Matrix]:
    """By name, in order. `dtype`: the run's, "bfloat16" or "float32"; `lm_head`: the tensor the logits come from."""
    found = dense_matrices(spec, names, lm_head=lm_head, dtype=dtype, quantization=quantization)
    for layer in spec.moe_layers:
        for expert in range(spec.moe.num_experts):
            found += expert_matrices(spec, layer, expert, dtype=dtype, quantization=quantization)
    return {matrix.name: matrix for matrix in found}


def dense_matrices(
    spec: DecoderSpec, names: ExpertNames, *, lm_head: str, dtype: str, quantization: str
) -> list[Matrix]:
    """All but the routed experts'."""
    hidden = spec.hidden_size
    quantization = run_quantization(spec, quantization)
    found: list[Matrix] = []

    def add(
        name: str, kind: Kind, num_out: int, num_k: int, tensors: tuple[str, ...], *, gate_up: bool = False
    ) -> None:
        format = weight_format(kind, dtype, quantization)
        found.append(
            Matrix(name=name, kind=kind, format=format, num_out=num_out, num_k=num_k, gate_up=gate_up, tensors=tensors)
        )

    def add_mlp(name: str, ffn: int, on_disk: str) -> None:
        gate_up = (f"{on_disk}.gate_proj.weight", f"{on_disk}.up_proj.weight")
        add(f"{name}gate_up", "dense", 2 * ffn, hidden, gate_up, gate_up=True)
        add(f"{name}down", "dense", hidden, ffn, (f"{on_disk}.down_proj.weight",))

    raw = "f32" if dtype == "float32" else "bf16"
    found.append(
        Matrix(name=EMBEDDING, kind="dense", format=raw, num_out=spec.vocab_size, num_k=hidden, tensors=(EMBED,))
    )
    for index, layer in enumerate(spec.layers):
        name, prefix = f"layers.{index}.", f"model.layers.{index}."
        attention = layer.attention
        q_rows, kv_rows = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        qkv = tuple(f"{prefix}self_attn.{part}_proj.weight" for part in "qkv")
        add(f"{name}qkv", "dense", q_rows + 2 * kv_rows, hidden, qkv)
        add(f"{name}out", "dense", hidden, q_rows, (f"{prefix}self_attn.o_proj.weight",))
        if not isinstance(layer.ffn, MoESpec):
            add_mlp(name, layer.ffn.ffn, f"{prefix}mlp")
            continue
        add(f"{name}router", "router", layer.ffn.num_experts, hidden, (names.router(index),))
        if layer.ffn.shared_ffn:
            add_mlp(f"{name}shared.", layer.ffn.shared_ffn, prefix + SHARED_EXPERT)
        if layer.ffn.shared_gate:
            add(f"{name}shared.gate", "router", 1, hidden, (prefix + SHARED_GATE,))
    add("lm_head", "lm_head", spec.vocab_size, hidden, (lm_head,))
    return found


def expert_matrices(
    spec: DecoderSpec, layer: int, expert: int, *, dtype: str, quantization: str
) -> tuple[Matrix, Matrix]:
    """(gate and up, down) of one logical expert of decoder layer `layer`."""
    ffn, hidden = spec.moe.ffn, spec.hidden_size
    format = weight_format("experts", dtype, run_quantization(spec, quantization))
    gate_up, down = expert_matrix_names(layer, expert)
    common = {"kind": "experts", "format": format, "expert": (layer, expert)}
    return (
        Matrix(name=gate_up, num_out=2 * ffn, num_k=hidden, gate_up=True, **common),  # type: ignore[arg-type]
        Matrix(name=down, num_out=hidden, num_k=ffn, **common),  # type: ignore[arg-type]
    )


def held_matrix_names(spec: DecoderSpec, expert_map: ExpertMap, rank: int) -> list[str]:
    """Of the experts that the map gives to this rank."""
    names: list[str] = []
    for index, layer in enumerate(spec.moe_layers):
        for expert in expert_map.local_experts(index, rank).tolist():
            if expert != EMPTY:
                names += expert_matrix_names(layer, expert)
    return names
