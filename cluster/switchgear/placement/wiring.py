"""From the user's settings to a `PlacementService`: `make_placement`, with the prices of this model's experts."""

from __future__ import annotations

from collections.abc import Callable

from switchgear.config import ServeConfig
from switchgear.launcher.base import Launcher
from switchgear.placement.controller import PlacementController
from switchgear.placement.cost_model import CostModel
from switchgear.placement.events import Committed
from switchgear.placement.expert_file import file_bytes_max
from switchgear.placement.planner_process import Planner, PlannerProcess
from switchgear.placement.service import PlacementService
from switchgear.placement.settings import PlacementSettings
from switchgear.server.core import ServerCore
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.messages import ToRank
from switchgear_runtime.model.footprint import run_dtype, slot_bytes
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.expert_map import ExpertMap
from switchgear_runtime.system import System

ITEMSIZE = {"float32": 4, "bfloat16": 2}


def make_placement(
    config: ServeConfig,
    engine: EngineConfig,
    spec: DecoderSpec,
    core: ServerCore,
    launcher: Launcher,
    *,
    system: System,
    send: Callable[[int, ToRank], None],
    wake: Callable[[], None],
) -> PlacementService:
    """ConfigError if the user's map does not fit. `send`, `wake`: see PlacementService."""
    settings = PlacementSettings(
        policy=config.placement,
        window_s=config.placement_window_s,
        bytes_per_s=config.migration_bytes_per_s or None,
        survive=engine.survive,
    )
    shape = (spec.num_moe_layers, spec.num_experts)
    initial = None
    if config.expert_map is not None:
        initial = ExpertMap.load(config.expert_map)
        settings.check_map(initial, *shape, num_ranks=config.ranks)
    controller = PlacementController(
        settings,
        cost_of(spec, engine),
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        system=system,
        initial=initial,
        oldest_version=lambda: core.oldest_version,
    )

    def committed(new: Committed) -> None:
        core.epoch, core.model_version = new.expert_map.epoch, new.versions.latest

    return PlacementService(
        controller,
        _planner(launcher),
        system=system,
        send=send,
        wake=wake,
        committed=committed,
        file_bytes_max=file_bytes_max(spec),
    )


def cost_of(spec: DecoderSpec, engine: EngineConfig) -> CostModel:
    dtype = run_dtype(spec, engine.dtype)
    return CostModel(
        expert_bytes=slot_bytes(spec, dtype, engine.quantization),
        row_flops=6.0 * spec.hidden_size * spec.moe.ffn,
        row_bytes=2.0 * spec.hidden_size * ITEMSIZE[dtype],
    )


def _planner(launcher: Launcher) -> Planner:
    """Where the launcher has a place of its own for it (a Ray actor), there; else a child of this process."""
    make = getattr(launcher, "make_planner", None)
    planner: Planner = PlannerProcess() if make is None else make()
    return planner
