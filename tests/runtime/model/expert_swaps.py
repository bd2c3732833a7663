"""Files with one expert's weights, and their oracle: the checkpoint in which that expert has these weights.

swap = write_expert(tmp_path / "a.safetensors", model_dir, layer=0, expert=5, seed=3)
newer = swapped_checkpoint(model_dir, tmp_path / "newer", [swap])
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from switchgear_runtime.model.checkpoint import Checkpoint
from switchgear_runtime.model.expert_file import NAMES
from switchgear_runtime.moe.model_versions import ModelVersions


@dataclass(frozen=True)
class ExpertFile:
    layer: int  # among MoE layers
    expert: int
    path: Path
    sha256: str

    def next_of(self, versions: ModelVersions) -> ModelVersions:
        return versions.with_swap(self.layer, self.expert, path=str(self.path), sha256=self.sha256)


def write_expert(
    path: Path, model_dir: Path, *, layer: int, expert: int, seed: int, dtype: str = "bfloat16", own_names: bool = False
) -> ExpertFile:
    """Random weights, as wide as the expert's own ones. `own_names`: the checkpoint's instead of the short ones."""
    checkpoint = Checkpoint(model_dir)
    index = checkpoint.spec.moe_layers[layer]
    names = checkpoint.names.expert(index, expert) if own_names else NAMES
    likes = [*checkpoint.expert_gate_up(index, expert).chunk(2), checkpoint.expert_down(index, expert)]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, like in zip(names, likes, strict=True):
        wide = torch.randn(like.shape, generator=generator) * like.float().std()
        tensors[name] = wide.to(getattr(torch, dtype))
    save_file(tensors, path)
    return ExpertFile(layer, expert, path, hashlib.sha256(path.read_bytes()).hexdigest())


def swapped_checkpoint(model_dir: Path, to: Path, files: Sequence[ExpertFile]) -> Path:
    """Files in order of their versions, so the last one of an expert wins."""
    checkpoint = Checkpoint(model_dir)
    shutil.copytree(model_dir, to)
    tensors = load_file(to / "model.safetensors")
    for file in files:
        names = checkpoint.names.expert(checkpoint.spec.moe_layers[file.layer], file.expert)
        given = load_file(file.path)
        weights = [given[own if own in given else short] for short, own in zip(NAMES, names, strict=True)]
        if checkpoint.names.fused:
            tensors[names[0]][file.expert] = torch.cat(weights[:2])
            tensors[names[2]][file.expert] = weights[2]
        else:
            tensors |= dict(zip(names, weights, strict=True))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to
