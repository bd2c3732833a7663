"""One expert's weights from a file: packed as the checkpoint's own would be, and every defect names the path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_swaps import swapped_checkpoint, write_expert
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_checkpoint, make_runner

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.expert_file import read_expert_file
from switchgear_runtime.model.swap_files import SwapFiles
from switchgear_runtime.moe.model_versions import ExpertSwap, ModelVersions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints"), "qwen3_moe", 5, dtype="bfloat16")


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize(("dtype", "own_names"), [("bfloat16", True), ("float32", False), ("float16", False)])
def test_it_is_packed_as_the_checkpoints_own(
    tmp_path: Path, model_dir: Path, dtype: str, own_names: bool, quantization: str
) -> None:
    file = write_expert(
        tmp_path / "x.safetensors", model_dir, layer=1, expert=4, seed=1, dtype=dtype, own_names=own_names
    )
    other = make_runner(swapped_checkpoint(model_dir, tmp_path / "other", [file]), quantization=quantization)
    runner = make_runner(model_dir, quantization=quantization)
    (swap,) = file.next_of(ModelVersions()).swaps
    pieces: list[int] = []
    ours, theirs = runner.experts.read(1, 4, swap, pieces.append), other.experts.read(1, 4)
    assert [torch.equal(mine.data, its.data) for mine, its in zip(ours, theirs, strict=True)] == [True, True]
    assert not torch.equal(ours[0].data, runner.experts.read(1, 4)[0].data)
    assert sum(pieces) == file.path.stat().st_size


def fuse(model_dir: Path) -> Path:
    """In place: the experts of a layer in two tensors, as Transformers has them in memory."""
    checkpoint = Checkpoint(model_dir)
    values = load_file(model_dir / "model.safetensors")
    for layer in checkpoint.spec.moe_layers:
        experts = range(checkpoint.spec.num_experts)
        prefix = f"model.layers.{layer}.mlp.experts."
        gate_up = torch.stack([checkpoint.expert_gate_up(layer, expert) for expert in experts])
        down = torch.stack([checkpoint.expert_down(layer, expert) for expert in experts])
        values = {name: tensor for name, tensor in values.items() if not name.startswith(prefix)}
        values |= {f"{prefix}gate_up_proj": gate_up, f"{prefix}down_proj": down}
    put(model_dir / "model.safetensors", values)
    return model_dir


def test_a_checkpoint_that_fuses_its_experts(tmp_path: Path) -> None:
    fused = fuse(make_checkpoint(tmp_path, "qwen3_moe", 5, dtype="bfloat16"))
    checkpoint = Checkpoint(fused)
    assert checkpoint.names.fused
    file = write_expert(tmp_path / "x", fused, layer=0, expert=2, seed=3)
    other = make_runner(swapped_checkpoint(fused, tmp_path / "other", [file]))
    (swap,) = file.next_of(ModelVersions()).swaps
    ours, theirs = make_runner(fused).experts.read(0, 2, swap), other.experts.read(0, 2)
    assert [torch.equal(mine.data, its.data) for mine, its in zip(ours, theirs, strict=True)] == [True, True]
    put(tmp_path / "x", {name: torch.ones(1) for name in checkpoint.names.expert(0, 2)})
    own = replace(swap, sha256=hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match=r"down_proj\.weight, and no"):
        read_expert_file(own, checkpoint.spec, checkpoint.names)  # its own tensors are those of all experts


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    """What the tiny model's experts are like: D 48, F 24."""
    shapes = {"gate_proj.weight": (24, 48), "up_proj.weight": (24, 48), "down_proj.weight": (48, 24)}
    return {name: torch.ones(shape) for name, shape in shapes.items()} | changes


def put(path: Path, values: dict[str, torch.Tensor]) -> None:
    save_file(values, path)


INT8 = torch.ones(48, 24, dtype=torch.int8)
NAN = torch.full((24, 48), torch.nan)
WRONG: list[tuple[str, Callable[[Path], object]]] = [
    ("cannot be read", lambda _: None),
    ("not a safetensors file", lambda path: path.write_bytes(b"")),
    ("not a safetensors file", lambda path: path.write_bytes(b"\xff" * 100)),
    ("more than one expert", lambda path: put(path, tensors(more=torch.zeros(1 << 19)))),
    ("expected gate_proj.weight", lambda path: put(path, {"w": torch.zeros(2)})),
    ("and no more", lambda path: put(path, tensors(bias=torch.zeros(2)))),
    ("layers.0.mlp.experts.3.", lambda path: put(path, {f"model.layers.0.mlp.experts.2.{n}": t for n, t in tensors().items()})),
    (r"up_proj.weight has shape \[48, 24\]", lambda path: put(path, tensors(**{"up_proj.weight": torch.ones(48, 24)}))),
    ("is not a file", lambda path: os.mkfifo(path)),
    ("gate_proj.weight has a number", lambda path: put(path, tensors(**{"gate_proj.weight": NAN}))),
    ("down_proj.weight has dtype torch.int8", lambda path: put(path, tensors(**{"down_proj.weight": INT8}))),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "write"), WRONG, ids=[reason for reason, _ in WRONG])
def test_defects(tmp_path: Path, model_dir: Path, reason: str, write: Callable[[Path], object]) -> None:
    path, checkpoint = tmp_path / "expert", Checkpoint(model_dir)
    write(path)
    data = path.read_bytes() if path.is_file() else b""
    swap = ExpertSwap(version=1, layer=0, expert=3, path=str(path), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_expert_file(swap, checkpoint.spec, checkpoint.names)
    assert str(path) in str(caught.value)


def test_other_bytes_are_refused_with_both_digests(tmp_path: Path, model_dir: Path) -> None:
    file, checkpoint = write_expert(tmp_path / "x", model_dir, layer=0, expert=0, seed=1), Checkpoint(model_dir)
    (swap,) = file.next_of(ModelVersions()).swaps
    write_expert(tmp_path / "x", model_dir, layer=0, expert=0, seed=2)
    with pytest.raises(CheckpointError, match=file.sha256) as caught:
        read_expert_file(swap, checkpoint.spec, checkpoint.names)
    assert hashlib.sha256(file.path.read_bytes()).hexdigest() in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_expert_file(replace(swap, path="a\0b"), checkpoint.spec, checkpoint.names)


def test_a_file_that_is_gone_or_another_is_read_from_its_copy(tmp_path: Path, model_dir: Path) -> None:
    file, checkpoint = write_expert(tmp_path / "x", model_dir, layer=0, expert=0, seed=1), Checkpoint(model_dir)
    (swap,) = file.next_of(ModelVersions()).swaps
    files = SwapFiles(tmp_path / "cache")
    first = read_expert_file(swap, checkpoint.spec, checkpoint.names, files=files)
    write_expert(file.path, model_dir, layer=0, expert=0, seed=2)
    for _ in range(2):  # other contents, then none
        again = read_expert_file(swap, checkpoint.spec, checkpoint.names, files=SwapFiles(tmp_path / "cache"))
        assert all(map(torch.equal, first, again))
        file.path.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=str(file.path)):
        read_expert_file(swap, checkpoint.spec, checkpoint.names)
    (copy,) = (tmp_path / "cache" / "experts").iterdir()
    copy.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_expert_file(swap, checkpoint.spec, checkpoint.names, files=files)


def test_without_a_fit_folder_no_copy_is_kept(tmp_path: Path, model_dir: Path) -> None:
    file, checkpoint = write_expert(tmp_path / "x", model_dir, layer=0, expert=0, seed=1), Checkpoint(model_dir)
    (swap,) = file.next_of(ModelVersions()).swaps
    (tmp_path / "cache").write_bytes(b"")  # no folder
    read_expert_file(swap, checkpoint.spec, checkpoint.names, files=SwapFiles(tmp_path / "cache"))
