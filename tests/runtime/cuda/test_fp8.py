"""fp8 weights: how they are made and kept, products with them, and models that run with them on the device engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks_rows import fp8_values
from device_runs import check_near, run_all
from reference_kernels import ReferenceKernels
from safetensors.torch import load_file, save_file
from test_engine_equality import assert_as_alone, draw_submits
from tiny_checkpoints import make_runner
from tiny_cluster import Alone, make_tiny_checkpoint, run_cluster
from usable_gpu import skip_without_gpu

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda import backend
from switchgear_runtime.cuda.fp8 import Fp8Weight, dequantize_fp8, join_fp8, quantize_fp8, split_fp8
from switchgear_runtime.cuda.library import FP8, STORE, device_library
from switchgear_runtime.errors import CheckpointError, ConfigError
from switchgear_runtime.model.footprint import slot_bytes
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.weight_format import fp8_bytes

BLOCK = 128
SEED = random.SystemRandom().randrange(1 << 30)
WHOLE_BLOCKS = {  # the rows of all parts that are stacked
    "num_attention_heads": 8, "num_key_value_heads": 8, "moe_intermediate_size": 128, "intermediate_size": 128,
}  # fmt: skip
KEPT = ("norm", "embed", "lm_head", "mlp.gate.")
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(params=["twin", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        skip_without_gpu()
    kind: str = request.param
    return kind


@pytest.mark.parametrize("shape", [(1, 16), (128, 128), (130, 48), (256, 400), (7, 272)])
def test_quantisation_by_blocks(shape: tuple[int, int]) -> None:
    """Each code is the nearest to value / scale, by search over all values of e4m3; blocks of zeros stay."""
    generator = torch.Generator().manual_seed(SEED)
    weight_NK = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-20, 20, shape, generator=generator)
    weight_NK[: BLOCK // 2, :8] = 0
    if shape[0] > BLOCK:
        weight_NK[BLOCK:, :BLOCK] = 0
    weight = Fp8Weight(quantize_fp8(weight_NK.bfloat16()), *shape)
    codes_NK, scales = split_fp8(weight)
    assert weight.data.numel() == fp8_bytes(*shape) == device_library("twin").sg_cuda_weight_bytes(*shape, 2)
    values = np.concatenate([fp8_values(), -fp8_values()])
    for row in range(0, shape[0], BLOCK):
        for column in range(0, shape[1], BLOCK):
            at = slice(row, row + BLOCK), slice(column, column + BLOCK)
            block = weight_NK.bfloat16()[at].float()
            scale = scales[row // BLOCK, column // BLOCK]
            assert scale == block.abs().max() / 448
            ratio = (block / scale if scale else block).numpy()
            off = np.abs(codes_NK[at].float().numpy() - ratio)
            assert (off <= np.abs(values[:, None, None] - ratio[None]).min(0)).all(), f"seed {SEED}"
    assert torch.equal(join_fp8(codes_NK, scales).view(torch.uint8), weight.data.view(torch.uint8))


def test_what_is_not_finite_is_refused() -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            quantize_fp8(torch.tensor([[1.0, wrong]]))


def test_products(device: str) -> None:
    kernels = backend.kernels_of(device, 0)
    generator = torch.Generator().manual_seed(SEED)
    with kernels.on_stream():
        x_MK = torch.randn(9, 272, generator=generator).bfloat16().to(kernels.device)
        weight = Fp8Weight(quantize_fp8(torch.randn(140, 272, generator=generator).to(kernels.device)), 140, 272)
        wide_MN = x_MK.double() @ dequantize_fp8(weight).double().T
        torch.testing.assert_close(kernels.linear(x_MK, weight).double(), wide_MN, rtol=1e-4, atol=1e-3)
        gate, up = wide_MN.chunk(2, 1)
        gated = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(kernels.gated_linear(x_MK, weight).double(), gated, rtol=1e-2, atol=1e-2)
        to_MN = torch.ones(9, 140, device=kernels.device)
        kernels.add_linear(to_MN, x_MK, weight, 0.5)
        torch.testing.assert_close(to_MN.double(), 1 + 0.5 * wide_MN, rtol=1e-4, atol=1e-3)
        assert torch.equal(kernels.linear(x_MK[4:5], weight)[0], kernels.linear(x_MK, weight)[4])
        rows = kernels.pack_rows(x_MK, FP8)
        codes_MK = rows[:, :272].contiguous().view(torch.float8_e4m3fn).float()
        scales = rows[:, 272:284].contiguous().view(torch.float32).repeat_interleave(BLOCK, 1)[:, :272]
        assert float((codes_MK * scales - x_MK.float()).abs().max()) < 0.2
        wide_MN = (codes_MK * scales).double() @ dequantize_fp8(weight).double().T
        torch.testing.assert_close(kernels.linear(rows, weight).double(), wide_MN, rtol=1e-4, atol=1e-3)
        y_MN = torch.zeros(9, 140, dtype=torch.bfloat16, device=kernels.device)
        kernels.grouped_gemm(
            rows,
            torch.tensor([0, weight.data.data_ptr()], device=kernels.device),
            y_MN,
            STORE,
            num_out=140,
            num_k=272,
            begin_S1=torch.tensor([0, 0, 9], dtype=torch.int32, device=kernels.device),
            format="fp8",
        )
        torch.testing.assert_close(y_MN.double(), wide_MN, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_near_the_slow_kernels(tmp_path: Path, device: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = make_tiny_checkpoint(tmp_path, SEED)
    fast = run_all(model_dir, world_size, SEED, device=device, quantization="fp8")
    monkeypatch.setattr(backend, "Kernels", lambda _kind, _device: ReferenceKernels())
    slow = run_all(model_dir, world_size, SEED, device="twin", quantization="fp8", small_step_tokens=0)
    check_near(fast, slow, f"seed {SEED}")
    monkeypatch.undo()
    plain = run_all(model_dir, world_size, SEED, device="twin")
    assert any(
        not torch.equal(a, b) for one, other in zip(fast, plain, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_tokens_do_not_depend_on_ranks(tmp_path: Path, device: str, world_size: int) -> None:
    model_dir = make_tiny_checkpoint(tmp_path, SEED)
    lab = (model_dir, Alone(model_dir, device=device, quantization="fp8"))
    submits = draw_submits(random.Random(SEED), 8, longest=30)
    run = run_cluster(model_dir, world_size, submits, device=device, quantization="fp8", max_num_seqs=8)
    assert_as_alone(lab, submits, run)


def in_fp8(model_dir: Path, to: Path, *, keep: Sequence[str] = KEPT, **config: Any) -> Path:
    """The checkpoint as those in fp8 are: codes and scales, but for what has one of `keep` in its name."""
    to.mkdir()
    tensors = {}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        if any(part in name for part in keep):
            tensors[name] = tensor
            continue
        codes_NK, scales = split_fp8(Fp8Weight(quantize_fp8(tensor), *tensor.shape))
        tensors |= {name: codes_NK.contiguous(), f"{name}_scale_inv": scales.contiguous()}
    save_file(tensors, to / "model.safetensors")
    known = json.loads((model_dir / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(known | {"quantization_config": QUANTIZATION} | config))
    return to


def test_a_checkpoint_in_fp8(tmp_path: Path, device: str) -> None:
    """Its own codes and scales, which are those that are made here of the same weights: bit for bit the same model."""
    plain = make_tiny_checkpoint(tmp_path, SEED, **WHOLE_BLOCKS)
    in_blocks = in_fp8(plain, tmp_path / "fp8")
    expected = run_all(plain, 2, SEED, device=device, quantization="fp8")
    for setting in ("none", "fp8"):
        found = run_all(in_blocks, 2, SEED, device=device, quantization=setting)
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b), f"seed {SEED}"
    spec = load_spec(in_blocks)
    assert slot_bytes(spec, "bfloat16") == fp8_bytes(256, 32) + fp8_bytes(32, 128)
    assert make_runner(in_blocks, device="twin").fingerprint() != make_runner(plain, device="twin").fingerprint()


def test_what_a_checkpoint_leaves_in_bf16_stays_so(tmp_path: Path) -> None:
    plain = make_tiny_checkpoint(tmp_path, SEED, **WHOLE_BLOCKS)
    runner = make_runner(in_fp8(plain, tmp_path / "fp8", keep=(*KEPT, "self_attn")), device="twin")
    formats = {name: matrix.format for name, matrix in runner._store.matrices.items()}
    assert formats["layers.0.qkv"] == formats["layers.0.out"] == formats["lm_head"] == "bf16"
    assert formats["layers.0.experts.0.down"] == runner._store.expert_format == "fp8"


def test_an_expert_that_comes_from_another_rank(tmp_path: Path) -> None:
    giver, taker = (
        make_runner(make_tiny_checkpoint(tmp_path, SEED), device="twin", quantization="fp8") for _ in range(2)
    )
    held = giver.experts.held(1, 5)
    assert held is not None
    weights = taker.experts.empty(1, 5)
    for weight, given in zip(weights, held, strict=True):
        assert weight.data.dtype == given.dtype == torch.uint8
        weight.data.copy_(given)
    placement = giver.moe_layers[1].placement
    assert placement is not None
    own = placement.find(5, "")
    assert own is not None
    for taken, expected in zip(taker._store.on_device(weights, (1, 5, "")), own, strict=True):
        assert taken.data.dtype == expected.dtype
        assert torch.equal(taken.data.view(torch.uint8), expected.view(torch.uint8))


def _without_config(root: Path) -> Path:
    return in_fp8(make_tiny_checkpoint(root, 1, **WHOLE_BLOCKS), root / "fp8", quantization_config=None)


def _with_router(root: Path) -> Path:
    return in_fp8(make_tiny_checkpoint(root, 1, **WHOLE_BLOCKS), root / "fp8", keep=KEPT[:3])


def _changed(change: Callable[[dict[str, torch.Tensor]], object], **sizes: int) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        made = in_fp8(make_tiny_checkpoint(root, 1, **(WHOLE_BLOCKS | sizes)), root / "fp8")
        tensors = load_file(made / "model.safetensors")
        change(tensors)
        save_file(tensors, made / "model.safetensors")
        return made

    return make


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_without_config, "is fp8, and config.json has no quantization_config"),
        (_with_router, r"mlp\.gate\.weight is fp8; only matrices of attention"),
        (_changed(lambda tensors: tensors.pop(f"{DOWN}_scale_inv")), f"{DOWN}_scale_inv is missing"),
        (_changed(lambda tensors: tensors.update({f"{DOWN}_scale_inv": torch.ones(1, 2)})), "has shape .1, 2., config"),
        (
            _changed(lambda tensors: tensors.update({f"{DOWN}_scale_inv": torch.ones(1, 1).half()})),
            "expected F32 or BF16",
        ),
        (_changed(lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()})), "has no place in the model"),
        (_changed(lambda _tensors: None, num_key_value_heads=4), "k_proj.weight has 64 rows, no multiple of 128"),
    ],
)
def test_checkpoints_that_are_refused(tmp_path: Path, make: Callable[[Path], Path], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        make_runner(make(tmp_path), device="twin")


def test_experts_of_both_kinds_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN].bfloat16()
        tensors.pop(f"{DOWN}_scale_inv")

    with pytest.raises(CheckpointError, match="some experts are fp8 and others are not"):
        make_runner(_changed(change)(tmp_path), device="twin")


def test_where_fp8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization='fp8' needs device='cuda': CPUs have no product"):
        EngineConfig(quantization="fp8")
    with pytest.raises(
        ConfigError, match="quantization='int8' is for device='cpu' only; with device='twin' give none or fp8"
    ):
        EngineConfig(quantization="int8", device="twin")
    plain = make_tiny_checkpoint(tmp_path, SEED, **WHOLE_BLOCKS)
    with pytest.raises(ConfigError, match="has fp8 weights, which CPUs have no product of; use device='cuda'"):
        make_runner(in_fp8(plain, tmp_path / "fp8"))
    with pytest.raises(CheckpointError, match="24 inputs; the device engine takes multiples of 16 of fp8"):
        make_runner(
            make_tiny_checkpoint(tmp_path / "odd", SEED, moe_intermediate_size=24), device="twin", quantization="fp8"
        )


def test_the_quantiser_refuses_what_is_not_finite_by_name(tmp_path: Path) -> None:
    plain = make_tiny_checkpoint(tmp_path, SEED)
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN][0, 0] = float("inf")
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.3\.down: a weight that is not finite"):
        make_runner(plain, device="twin", quantization="fp8")
