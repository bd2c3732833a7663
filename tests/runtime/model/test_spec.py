"""config.json -> DecoderSpec: every architecture, both forms of rotary keys, and every refusal by key and value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import BUNDLED

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.spec import DenseSpec, MoESpec, load_spec

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
    "hidden_act": "silu",
}  # fmt: skip
COMMON: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN2 = COMMON | {
    "model_type": "qwen2_moe", "num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
}  # fmt: skip
OLMOE = COMMON | {"model_type": "olmoe", "num_experts": 8}
FLEX_OLMO = COMMON | {"model_type": "flex_olmo", "num_experts": 8}
GRANITE = COMMON | {"model_type": "granitemoe", "num_local_experts": 8}
PHI = COMMON | {"model_type": "phimoe", "num_local_experts": 8}


def write(folder: Path, config: object, generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_bundled_model() -> None:
    spec = load_spec(BUNDLED)
    assert (spec.architecture, spec.num_layers, spec.num_moe_layers, spec.num_experts) == ("qwen3_moe", 4, 4, 32)
    assert (spec.moe.top_k, spec.moe.ffn, spec.moe.renormalize, spec.moe.scoring) == (4, 128, True, "softmax")
    assert (spec.eos_token_ids, spec.dtype, spec.tie_word_embeddings) == ((0,), "bfloat16", True)
    assert spec.layers[0].attention.qk_norm == "head"
    assert spec.layers[0].attention.sliding_window is None


def test_weights_in_fp8(tmp_path: Path) -> None:
    assert load_spec(write(tmp_path, QWEN)).quantization is None
    assert load_spec(write(tmp_path, QWEN | {"quantization_config": FP8})).quantization == "fp8"
    least = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    assert load_spec(write(tmp_path, MIXTRAL | {"quantization_config": least})).quantization == "fp8"


def test_mixtral_has_its_own_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, MIXTRAL))
    attention = spec.layers[0].attention
    assert (attention.head_dim, attention.qk_norm, attention.qkv_bias, attention.out_bias) == (8, None, False, False)
    assert (spec.rope.theta, spec.rms_norm_eps, spec.max_position_embeddings) == (1e6, 1e-5, 131072)
    assert (spec.moe.ffn, spec.moe.renormalize) == (48, True)


def test_qwen2_moe_has_its_own_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, QWEN2))
    attention = spec.layers[0].attention
    assert (attention.qkv_bias, attention.out_bias, attention.qk_norm) == (True, False, None)
    assert (spec.moe.ffn, spec.moe.shared_ffn, spec.moe.shared_gate, spec.moe.renormalize) == (16, 24, True, False)
    assert (spec.rope.theta, spec.rms_norm_eps, spec.max_position_embeddings) == (1e4, 1e-6, 32768)


def test_the_olmos_have_their_own_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, OLMOE))
    attention = spec.layers[0].attention
    assert (attention.qk_norm, attention.clip_qkv, attention.qkv_bias) == ("projection", None, False)
    assert (spec.norm_placement, spec.moe.renormalize, spec.rope.theta, spec.rms_norm_eps) == ("pre", False, 1e4, 1e-5)
    assert load_spec(write(tmp_path, OLMOE | {"clip_qkv": 8.0})).layers[3].attention.clip_qkv == 8.0
    spec = load_spec(write(tmp_path, FLEX_OLMO))
    assert (spec.norm_placement, spec.moe.renormalize, spec.rope.theta, spec.rms_norm_eps) == ("post", False, 5e5, 1e-6)


def test_granite_moe_has_its_own_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GRANITE))
    assert (spec.embedding_multiplier, spec.residual_multiplier, spec.logits_scaling) == (1.0, 1.0, 1.0)
    assert (spec.layers[0].attention.scale, spec.moe.renormalize, spec.rope.theta) == (1.0, True, 1e4)
    keys = {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 6, "attention_multiplier": 0.015}
    spec = load_spec(write(tmp_path, GRANITE | keys))
    assert (spec.embedding_multiplier, spec.residual_multiplier, spec.logits_scaling) == (12.0, 0.22, 6.0)
    assert spec.layers[0].attention.scale == 0.015


def test_phi_moe_has_its_own_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, PHI))
    assert (spec.norm, spec.lm_head_bias, spec.layers[0].attention.qkv_bias) == ("layer", False, False)
    assert (spec.moe.scoring, spec.moe.jitter_eps, spec.moe.top_k) == ("sparsemixer", 0.01, 2)
    assert (spec.rope.theta, spec.rms_norm_eps, spec.max_position_embeddings) == (1e6, 1e-5, 131072)
    spec = load_spec(write(tmp_path, PHI | {"attention_bias": True, "lm_head_bias": True, "sliding_window": 9}))
    attention = spec.layers[0].attention
    assert (spec.lm_head_bias, attention.qkv_bias, attention.out_bias, attention.sliding_window) == (
        True,
        True,
        True,
        9,
    )


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 8}, [None] * 4),
        ({"sliding_window": 8, "use_sliding_window": True}, [8, None, 8, None]),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, [8, None, None, None]),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
         [None, None, None, 4096]),
    ],
)  # fmt: skip
def test_qwen2_sliding_window_by_layer(tmp_path: Path, keys: dict[str, Any], windows: list[int | None]) -> None:
    spec = load_spec(write(tmp_path, QWEN2 | keys))
    assert [layer.attention.sliding_window for layer in spec.layers] == windows


@pytest.mark.parametrize(
    "config", [QWEN, MIXTRAL, QWEN2, OLMOE, FLEX_OLMO, GRANITE, PHI], ids=lambda c: c["model_type"]
)
def test_an_old_config_names_its_architecture_only(tmp_path: Path, config: dict[str, Any]) -> None:
    names = {"qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "flex_olmo": "FlexOlmo", "granitemoe": "GraniteMoe",
             "phimoe": "PhiMoE"}  # fmt: skip
    model_type = config["model_type"]
    architecture = names.get(model_type, model_type.capitalize()) + "ForCausalLM"
    spec = load_spec(write(tmp_path, config | {"model_type": None, "architectures": [architecture]}))
    assert spec == load_spec(write(tmp_path, config))


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [0, 2]}, [0, 2]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3]),
    ],
)
def test_dense_layers(tmp_path: Path, keys: dict[str, Any], dense: list[int]) -> None:
    spec = load_spec(write(tmp_path, QWEN | keys))
    assert [index for index, layer in enumerate(spec.layers) if isinstance(layer.ffn, DenseSpec)] == dense
    assert list(spec.moe_layers) == [index for index in range(4) if index not in dense]
    assert all(isinstance(spec.layers[index].ffn, MoESpec) for index in spec.moe_layers)


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_theta": 3e6, "rope_type": "default"}}, 3e6),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 8.0}}, 8.0),
    ],
)
def test_rope_theta_in_both_forms(tmp_path: Path, keys: dict[str, Any], theta: float) -> None:
    assert load_spec(write(tmp_path, QWEN | keys)).rope.theta == theta


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (None, None, ()),
        (5, None, (5,)),
        (5, {"eos_token_id": [9, 7]}, (7, 9)),
        (5, {"do_sample": True}, (5,)),
        ([3, 3, 1], None, (1, 3)),
        (151643, None, ()),
    ],
)
def test_eos_token_ids(
    tmp_path: Path, config_eos: Any, generation: dict[str, Any] | None, expected: tuple[int]
) -> None:
    assert load_spec(write(tmp_path, QWEN | {"eos_token_id": config_eos}, generation)).eos_token_ids == expected


def test_qwen_sliding_window_counts_only_when_used(tmp_path: Path) -> None:
    unused = load_spec(write(tmp_path, QWEN | {"sliding_window": 8, "use_sliding_window": False}))
    assert unused.layers[0].attention.sliding_window is None
    used = load_spec(write(tmp_path, QWEN | {"sliding_window": 8, "use_sliding_window": True}))
    assert used.layers[0].attention.sliding_window == 8


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (QWEN | {"model_type": "gpt2"}, "model_type", "gpt2"),
        ({k: v for k, v in QWEN.items() if k != "model_type"}, "model_type", "None"),
        (QWEN | {"hidden_act": "gelu"}, "hidden_act", "gelu"),
        (QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type", "yarn"),
        (QWEN | {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type", "llama3"),
        (QWEN | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "0.5"),
        (QWEN | {"rope_theta": -1}, "rope_theta", "-1"),
        (QWEN | {"quantization_config": "fp8"}, "quantization_config", "fp8"),
        (QWEN | {"quantization_config": FP8 | {"quant_method": "gptq"}}, "quantization_config.quant_method", "gptq"),
        (QWEN | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size", "None"),
        (QWEN | {"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, "weight_block_size", "[1, 128]"),
        (QWEN | {"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt", "e5m2"),
        (QWEN | {"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme", "static"),
        (QWEN | {"dtype": "float8_e4m3fn"}, "dtype", "float8_e4m3fn"),
        (QWEN | {"num_key_value_heads": 3}, "num_key_value_heads", "3"),
        (QWEN | {"head_dim": 15}, "head_dim", "15"),
        (QWEN | {"num_experts_per_tok": 9}, "num_experts_per_tok", "9"),
        (QWEN | {"num_local_experts": 9}, "num_local_experts", "9"),
        (QWEN | {"hidden_size": 0}, "hidden_size", "0"),
        (QWEN | {"hidden_size": True}, "hidden_size", "True"),
        (QWEN | {"hidden_size": "32"}, "hidden_size", "32"),
        (QWEN | {"num_hidden_layers": 10**12}, "num_hidden_layers", "1000000000000"),
        (QWEN | {"rms_norm_eps": "tiny"}, "rms_norm_eps", "tiny"),
        (QWEN | {"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
        (QWEN | {"mlp_only_layers": "all"}, "mlp_only_layers", "all"),
        (QWEN | {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers", "no layer has experts"),
        (QWEN | {"eos_token_id": "</s>"}, "eos_token_id", "</s>"),
        ({k: v for k, v in QWEN.items() if k != "vocab_size"}, "vocab_size", "missing"),
        ({k: v for k, v in QWEN.items() if k != "num_experts"}, "num_experts", "missing"),
        (MIXTRAL | {"attention_bias": True}, "attention_bias", "True"),
        (MIXTRAL | {"sliding_window": 0}, "sliding_window", "0"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window", "layer_types"),
        (QWEN2 | {"layer_types": ["full_attention"] * 3}, "layer_types", "num_hidden_layers=4"),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 4}, "layer_types", "chunked_attention"),
        (QWEN2 | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size", "0"),
        (QWEN2 | {"rope_scaling": {"type": "yarn"}}, "rope_scaling.rope_type", "yarn"),
        ({k: v for k, v in QWEN2.items() if k != "shared_expert_intermediate_size"}, "shared_expert_", "missing"),
        (OLMOE | {"clip_qkv": -1.0}, "clip_qkv", "-1.0"),
        (OLMOE | {"sliding_window": 64}, "sliding_window", "64"),
        (OLMOE | {"hidden_act": "gelu"}, "hidden_act", "gelu"),
        (FLEX_OLMO | {"clip_qkv": 1.0}, "clip_qkv", "1.0"),
        (GRANITE | {"residual_multiplier": "much"}, "residual_multiplier", "much"),
        (GRANITE | {"logits_scaling": 0}, "logits_scaling", "0"),
        (GRANITE | {"shared_intermediate_size": 64}, "shared_intermediate_size", "64"),
        (PHI | {"num_experts_per_tok": 3}, "num_experts_per_tok", "3"),
        (PHI | {"router_jitter_noise": -0.01}, "router_jitter_noise", "-0.01"),
        (PHI | {"lm_head_bias": "yes"}, "lm_head_bias", "yes"),
        (PHI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling.rope_type", "longrope"),
        (PHI | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type", "longrope"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_named(tmp_path: Path, config: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_spec(write(tmp_path, config))
    assert key in str(caught.value)
    assert value in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_spec(tmp_path)
    for data in (b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]"):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_spec(tmp_path)


def test_spec_and_expert_map_import_no_torch() -> None:
    code = "import sys, switchgear_runtime.model.spec as s, switchgear_runtime.moe.expert_map; s.load_spec(sys.argv[1])"
    code += "; print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code, BUNDLED], capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout.strip() == "False"
