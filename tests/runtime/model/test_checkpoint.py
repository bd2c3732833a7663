"""Checkpoints on disk: each defect is named before a weight is read, and a rank reads its own experts only."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_checkpoint, make_runner

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.names import LAYOUTS
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.packing_reference import unpack

ROUTER = "model.layers.0.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


class NoTransport:
    """For `begin`, which only keeps it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_moe", 0)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "mixtral", 0, max_shard_size="40KB")


def words(value: object) -> str | None:
    """Names of tests that are the same in every process of pytest."""
    return None if callable(value) else str(value)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return edit


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (edit_tensors(lambda t: t.pop(EXPERT)), [EXPERT, "missing"]),
        (edit_tensors(lambda t: t.pop("lm_head.weight")), ["lm_head.weight", "missing"]),
        (edit_tensors(lambda t: t.update({ROUTER: t[ROUTER][:-1]})), [ROUTER, "[5, 48]", "[6, 48]"]),
        (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].T})), [EXPERT, "[48, 24]", "[24, 48]"]),
        (edit_tensors(lambda t: t.update({ROUTER: t[ROUTER].long()})), [ROUTER, "I64"]),
        (
            edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
            ["model.layers.0.self_attn.q_proj.bias", "no place"],
        ),
        (edit_bytes(lambda data: data[:-100]), ["model.safetensors is truncated", "download it again"]),
        (edit_bytes(lambda data: data[:50]), ["model.safetensors is truncated"]),
        (edit_bytes(lambda _: b""), ["model.safetensors is truncated"]),
        (edit_bytes(lambda data: b"\xff" * 8 + data[8:]), ["not a safetensors file"]),
        (edit_bytes(lambda _: struct.pack("<Q", 4) + b"{{{{"), ["header is not valid JSON"]),
        (edit_bytes(lambda _: struct.pack("<Q", 2) + b"[]"), ["header is not a JSON object"]),
        (edit_header(lambda h: h[EXPERT].pop("shape")), [EXPERT, "malformed"]),
        (edit_header(lambda h: h[EXPERT].update(data_offsets=[8, 4])), [EXPERT, "malformed"]),
        (edit_header(lambda h: h[EXPERT].update(data_offsets=[0, 8])), [EXPERT, "8 bytes"]),
        (edit_header(lambda h: h[EXPERT].update(shape=[-1, 48])), [EXPERT, "malformed"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
    ],
    ids=words,
)
def test_defects_of_a_single_file(tmp_path: Path, source: Path, edit: Callable[[Path], None], names: list[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    edit(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for name in names:
        assert name in str(caught.value), str(caught.value)


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


LAST = "model-00002-of-"


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda folder: next(folder.glob(LAST + "*")).unlink(), [LAST, "is missing"]),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), ["index.json is not valid JSON"]),
        (edit_index(lambda index: index.pop("weight_map")), ["weight_map"]),
        (edit_index(lambda index: index.update(weight_map=[1])), ["weight_map"]),
        (edit_index(lambda index: index["weight_map"].pop("model.norm.weight")), ["model.norm.weight", "missing"]),
        (edit_index(lambda index: index["weight_map"].update(a="../../etc/passwd")), ["../../etc/passwd"]),
        (edit_index(lambda index: index["weight_map"].update(a=7)), ["'a'", "7"]),
        (edit_index(lambda index: index["weight_map"].update(ghost=index["weight_map"]["lm_head.weight"])), ["ghost"]),
    ],
    ids=words,
)
def test_defects_of_an_index(tmp_path: Path, sharded: Path, edit: Callable[[Path], None], names: list[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    edit(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for name in names:
        assert name in str(caught.value), str(caught.value)


def test_shards_read_as_one_file_does(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected: dict[str, torch.Tensor] = {}
    for path in sharded.glob("*.safetensors"):
        expected |= load_file(path)
    checkpoint = Checkpoint(sharded)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in expected.items())


def test_odd_header_lengths_give_the_same_values(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    edit_header(lambda header: header.setdefault("__metadata__", {}).update(pad="x" * 3))(folder)
    start = Checkpoint(folder).entry(EXPERT).start
    if start % 4 == 0:
        edit_header(lambda header: header["__metadata__"].update(pad="x" * 4))(folder)
    assert Checkpoint(folder).entry(EXPERT).start % 4
    assert torch.equal(Checkpoint(folder).tensor(EXPERT), Checkpoint(source).tensor(EXPERT))


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    return checkpoint.expert_gate_up(layer, expert), checkpoint.expert_down(layer, expert)


@pytest.mark.parametrize("arch", sorted(LAYOUTS))
def test_fused_experts_give_the_same_values(tmp_path: Path, arch: str) -> None:
    plain = make_checkpoint(tmp_path, arch, 1)
    checkpoint = Checkpoint(plain)
    on_disk, in_memory = LAYOUTS[arch]
    assert checkpoint.names == on_disk
    fused = tmp_path / "fused"
    shutil.copytree(plain, fused)
    tensors = load_file(plain / "model.safetensors")
    for layer in checkpoint.spec.moe_layers:
        pairs = [read_expert(checkpoint, layer, expert) for expert in range(checkpoint.spec.num_experts)]
        for expert in range(checkpoint.spec.num_experts):
            for name in on_disk.expert(layer, expert):
                tensors.pop(name, None)
        gate_up, _, down = in_memory.expert(layer, 0)
        tensors[gate_up] = torch.stack([w13 for w13, _ in pairs])
        tensors[down] = torch.stack([w2 for _, w2 in pairs])
        tensors[in_memory.router(layer)] = tensors.pop(on_disk.router(layer))
    save_file(tensors, fused / "model.safetensors")
    assert Checkpoint(fused).names == in_memory
    for layer in checkpoint.spec.moe_layers:
        for expert in range(checkpoint.spec.num_experts):
            ours, theirs = read_expert(Checkpoint(fused), layer, expert), read_expert(checkpoint, layer, expert)
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("on_disk", "requested", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float16", "bfloat16", torch.bfloat16),
    ],
)
def test_dtype(tmp_path: Path, on_disk: str, requested: str, expected: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path, "mixtral", 0, dtype=on_disk)
    assert Checkpoint(folder).dtype(requested) == expected
    runner = make_runner(folder, dtype=requested)
    assert runner.dtype == expected
    assert runner.kv_cache.k[0].dtype == expected
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]  # an old checkpoint that does not say: the tensors do
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).dtype(requested) == expected


def test_opening_reads_no_weight(source: Path) -> None:
    checkpoint = Checkpoint(source)
    assert (checkpoint.num_bytes_read, checkpoint.num_tensors_read) == (0, 0)


def test_identity_tells_checkpoints_apart(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    assert Checkpoint(folder).identity() == Checkpoint(source).identity()
    edit_tensors(lambda tensors: tensors[ROUTER].mul_(1.01))(folder)
    assert Checkpoint(folder).identity() != Checkpoint(source).identity()


@pytest.mark.parametrize("world_size", [1, 4])  # 6 experts on 4 ranks: 2, 2, 1, 1
def test_a_rank_reads_its_own_experts_only(tmp_path: Path, source: Path, world_size: int) -> None:
    spec = Checkpoint(source).spec
    expert_map = ExpertMap.contiguous(spec.num_moe_layers, spec.num_experts, world_size)
    file_bytes = sum(entry.numel() * 4 for entry in load_file(source / "model.safetensors").values())
    expert_bytes = 3 * 24 * 48 * 4
    dense_bytes = file_bytes - spec.num_moe_layers * spec.num_experts * expert_bytes
    for rank in range(world_size):
        own = [expert for expert in expert_map.local_experts(0, rank).tolist() if expert >= 0]
        poisoned = tmp_path / f"rank-{rank}"
        shutil.copytree(source, poisoned)
        tensors = load_file(source / "model.safetensors")
        for name in tensors:
            if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) not in own:
                tensors[name].fill_(float("nan"))
        save_file(tensors, poisoned / "model.safetensors")
        runner = make_runner(poisoned, rank=rank, world_size=world_size)
        own_bytes = dense_bytes + spec.num_moe_layers * len(own) * expert_bytes
        assert runner.checkpoint.num_bytes_read == own_bytes
        runner.begin(cast(Any, NoTransport(rank, world_size)), expert_map)
        assert runner.checkpoint.num_bytes_read == own_bytes  # a generation begins without reading
        for layer in runner.moe_layers:
            assert layer.experts is not None
            slots = layer.experts
            for slot, expert in enumerate(slots.experts.tolist()):
                sizes = ((slots.w13_S[slot], 48, 48, True), (slots.w2_S[slot], 48, 24, False))
                assert (expert >= 0) == all(len(data) for data, *_ in sizes)
                for data, num_out, num_k, gate_up in sizes if expert >= 0 else ():
                    assert unpack(data, slots.format, num_out, num_k, gate_up=gate_up).isfinite().all()
