"""The footprint's sums are what a real ModelRunner allocates, to the byte, for every architecture and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import SIZES, make_checkpoint, make_runner

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model import footprint
from switchgear_runtime.model.spec import DecoderSpec, load_spec
from switchgear_runtime.model_runner import ModelRunner
from switchgear_runtime.moe.expert_map import ExpertMap


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def tensor_bytes(*roots: object, skip: tuple[object, ...] = ()) -> int:
    """Of all tensors that can be reached through attributes and containers, each memory once."""
    seen = {id(thing) for thing in skip}
    storages: dict[int, int] = {}
    found = list(roots)
    while found:
        thing = found.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            assert thing.is_contiguous()
            storages[thing.data_ptr()] = thing.numel() * thing.element_size()
        elif isinstance(thing, dict):
            found += thing.values()
        elif isinstance(thing, list | tuple | set):
            found += thing
        elif type(thing).__module__.startswith("switchgear_runtime"):
            found += vars(thing).values() if hasattr(thing, "__dict__") else []
            slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
            found += (getattr(thing, name) for name in slots if hasattr(thing, name))
    return sum(storages.values())


def compare(runner: ModelRunner, dtype: str, *, num_holders: int, quantization: str = "none") -> None:
    spec = runner.spec
    experts = [layer.experts for layer in runner.moe_layers]
    caches = (runner.kv_cache.k, runner.kv_cache.v)
    slots = footprint.slots_per_layer(spec, num_holders)
    num_held = 0
    for layer in experts:
        assert layer is not None
        assert len(layer.experts) == slots
        num_held += int((layer.experts >= 0).sum())
    assert tensor_bytes(*experts) == num_held * footprint.slot_bytes(spec, dtype, quantization)
    block = footprint.kv_block_bytes(spec, dtype, runner.config.block_size)
    assert tensor_bytes(*caches) == runner.num_kv_blocks * block
    dense = footprint.dense_bytes(spec, dtype, quantization, num_positions=runner.max_model_len)
    assert tensor_bytes(runner, skip=(*experts, runner.kv_cache)) == dense.total
    assert dense.shared == sum(runner._store.matrices[name].num_bytes for name in runner._store.dense_names())
    for num_ranks in (1, 2, 5, 64):
        mailbox = runner.mailbox_bytes(num_ranks)
        assert mailbox == footprint.mailbox_bytes(spec, dtype, runner.config.max_num_batched_tokens, num_ranks)
        outgoing = mailbox * footprint.MAILBOX_BUFFERS * (num_ranks - 1)
        assert mailbox == footprint.MAILBOX_BYTES_MIN or outgoing <= footprint.MAILBOXES_BYTES_MAX


@pytest.mark.parametrize("arch", SIZES)
def test_what_a_runner_allocates(arch: str, root: Path) -> None:
    model_dir = make_checkpoint(root, arch, 1)
    for world_size in (1, 2, 3, 4):
        for dtype, quantization in (
            ("float32", "none"),
            ("bfloat16", "none"),
            ("bfloat16", "int8"),
            ("bfloat16", "int4"),
        ):
            settings = {"dtype": dtype, "quantization": quantization, "num_kv_blocks": 7}
            runner = make_runner(model_dir, rank=world_size - 1, world_size=world_size, **settings)
            compare(runner, dtype, num_holders=world_size, quantization=quantization)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("arch", ["qwen2_moe", "phimoe"])
def test_quantised_weights(arch: str, quantization: str, root: Path) -> None:
    runner = make_runner(make_checkpoint(root, arch, 1, dtype="bfloat16"), quantization=quantization)
    compare(runner, "bfloat16", num_holders=1, quantization=quantization)


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("qwen3_moe", {"tie_word_embeddings": True, "mlp_only_layers": [0], "attention_bias": True, "vocab_size": 160}),
        ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("olmoe", {"attention_bias": True, "num_experts": 7}),
        ("granitemoe", {"attention_bias": True, "num_local_experts": 17}),
    ],
)
def test_options_that_change_sizes(arch: str, overrides: dict[str, Any], root: Path) -> None:
    model_dir = make_checkpoint(root, arch, 1, dtype="bfloat16", **overrides)
    for settings in ({"num_kv_blocks": 3}, {"max_model_len": 100, "block_size": 32, "max_num_batched_tokens": 4096}):
        compare(make_runner(model_dir, rank=0, world_size=3, **settings), "bfloat16", num_holders=3)


def test_a_pool_for_fewer_holders_is_that_of_their_contiguous_map(root: Path) -> None:
    """Survive F: the slots with which any R - F ranks can hold all experts are those they would hold contiguously."""
    spec = load_spec(make_checkpoint(root, "qwen3_moe", 1))
    for holders in (1, 2, 3, 4):
        contiguous = ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, holders)
        assert footprint.slots_per_layer(spec, holders) == contiguous.slots_per_rank


def test_float16_widens_and_no_dtype_is_an_error(root: Path) -> None:
    half = load_spec(make_checkpoint(root, "mixtral", 1, dtype="float16"))
    assert footprint.run_dtype(half, "auto") == "float32"
    assert footprint.run_dtype(half, "bfloat16") == "bfloat16"
    compare(make_runner(make_checkpoint(root, "mixtral", 1, dtype="float16")), "float32", num_holders=1)
    silent = DecoderSpec(**{name: getattr(half, name) for name in half.__slots__} | {"dtype": None})
    with pytest.raises(ConfigError, match="give bfloat16 or float32"):
        footprint.run_dtype(silent, "auto")
