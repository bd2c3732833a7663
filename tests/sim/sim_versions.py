"""Experts to load in simulation, and what is to come of it: `TunedModel`, with one rank alone for each model version."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
from expert_swaps import ExpertFile, swapped_checkpoint, write_expert
from tiny_cluster import Alone

from switchgear_runtime.messages import Submit
from switchgear_runtime.model.spec import load_spec
from switchgear_runtime.moe.model_versions import ExpertSwap

NUM_FILES = 6


class TunedModel:
    """`files` can be loaded; the first three are of one expert."""

    def __init__(self, model_dir: Path, root: Path, seed: int) -> None:
        rng, spec = random.Random(seed), load_spec(model_dir)
        places = [(rng.randrange(spec.num_moe_layers), rng.randrange(spec.num_experts)) for _ in range(NUM_FILES - 2)]
        self.files = [
            write_expert(root / f"{index}.safetensors", model_dir, layer=layer, expert=expert, seed=index)
            for index, (layer, expert) in enumerate([places[0]] * 2 + places)
        ]
        self._model_dir = model_dir
        self._root = root
        self._alone: dict[tuple[ExpertFile, ...], Alone] = {}

    def oracle(self, history: dict[int, ExpertSwap]) -> VersionedAlone:
        """`history`: all versions that were ever in force."""
        return VersionedAlone(self, history)

    def alone(self, swaps: tuple[ExpertFile, ...]) -> Alone:
        if swaps not in self._alone:
            path = self._root / f"checkpoint-{len(self._alone)}"
            self._alone[swaps] = Alone(swapped_checkpoint(self._model_dir, path, swaps))
        return self._alone[swaps]


class VersionedAlone:
    """In place of Alone: each sequence by the checkpoint of its version."""

    def __init__(self, model: TunedModel, history: dict[int, ExpertSwap]) -> None:
        self._model = model
        self._history = history

    def outputs(self, submit: Submit) -> Any:
        return self._of(submit).outputs(_plain(submit))

    def scored(self, submit: Submit) -> Any:
        return self._of(submit).scored(_plain(submit))

    def _of(self, submit: Submit) -> Alone:
        assert submit.version == 0 or submit.version in self._history, "a version that never was in force"
        newest = {swap.place: swap for version, swap in sorted(self._history.items()) if version <= submit.version}
        return self._model.alone(
            tuple(ExpertFile(*place, Path(swap.path), swap.sha256) for place, swap in sorted(newest.items()))
        )


def _plain(submit: Submit) -> Submit:
    """For a rank that knows no versions."""
    return msgspec.structs.replace(submit, version=0)
