"""Which settings go together, and which number of ranks they allow: checks before any process starts."""

from __future__ import annotations

from dataclasses import replace

from switchgear.config import RANKS_MAX, ServeConfig
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.device_footprint import GPU_MEMORY_UTILIZATION
from switchgear_runtime.cuda.facts import gather_facts
from switchgear_runtime.cuda.preflight import require_gpu
from switchgear_runtime.errors import ConfigError, RequestError
from switchgear_runtime.model.spec import DecoderSpec
from switchgear_runtime.moe.forced_routing import ForcedRouting


def check_settings(config: ServeConfig, engine: EngineConfig) -> EngineConfig:
    """With gpu_memory_utilization, where it hangs on who starts how many ranks."""
    if engine.transport == "loopback" and config.ranks > 1:
        raise ConfigError("transport='loopback' joins ranks inside one process; rank processes need transport='auto'")
    if engine.transport == "mpi" and config.launcher != "mpi":
        raise ConfigError(f"transport='mpi' needs launcher='mpi', not {config.launcher!r}: its ranks are one MPI job")
    if engine.device != "cuda":
        return engine
    num_gpus = config.ranks
    if config.launcher == "local" or (config.launcher == "ray" and not config.ray_address):
        # Ranks on other hosts look for themselves.
        facts = require_gpu(num_ranks=config.ranks, transport=engine.transport, dispatch=engine.dispatch)
        num_gpus = len(facts.gpus)
    if engine.gpu_memory_utilization is not None:
        return engine
    return replace(engine, gpu_memory_utilization=GPU_MEMORY_UTILIZATION / ranks_per_gpu(config, num_gpus))


def ranks_per_gpu(config: ServeConfig, num_gpus: int) -> int:
    """Most ranks that share one of this host's `num_gpus`; of MPI's hosts nothing is known."""
    if config.launcher == "ray":
        return max(1, int(1 / config.ray_gpus_per_rank))
    return -(-config.ranks // num_gpus) if config.launcher == "local" else 1


def check_forced_routing(engine: EngineConfig, spec: DecoderSpec) -> None:
    """ConfigError unless the trace fits the model; ranks load their own."""
    ForcedRouting.load(
        engine.forced_routing,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.moe.top_k,
    )


def check_scale(config: ServeConfig, engine: EngineConfig, num_ranks: int) -> None:
    """RequestError if the running cluster can never have so many ranks."""
    if not 1 <= num_ranks <= RANKS_MAX:
        raise RequestError(f"ranks={num_ranks} must be from 1 to {RANKS_MAX}", param="ranks")
    if config.launcher == "mpi":
        raise RequestError(
            "the ranks of launcher='mpi' are one MPI job, which cannot grow or shrink; start anew with --ranks"
        )
    if engine.device == "cuda":
        _check_gpus(config, engine, num_ranks)
    if engine.transport == "loopback" and num_ranks > 1:
        raise RequestError("transport='loopback' joins ranks inside one process; start anew with --transport auto")


def _check_gpus(config: ServeConfig, engine: EngineConfig, num_ranks: int) -> None:
    """RequestError where the memory of GPUs is spoken for: ranks' pools and caches have their sizes from the start."""
    least = max(1, config.ranks - engine.survive)
    is_rest = engine.num_kv_blocks is None and engine.kv_cache_memory_bytes is None
    if is_rest and num_ranks < least:
        raise RequestError(
            f"ranks={num_ranks}: {config.ranks} ranks with --survive {engine.survive} have slots for the experts of {least} or "
            "more, and what is left of their GPUs is KV cache; start anew with more --survive, or with fewer --ranks",
            param="ranks",
        )
    if config.launcher != "local" or engine.gpu_memory_utilization is None:
        return
    num_gpus = len(gather_facts().gpus)
    most = num_gpus * int(1 / engine.gpu_memory_utilization)
    if is_rest and num_ranks > most:
        raise RequestError(
            f"ranks={num_ranks}: {num_gpus} GPUs hold {most} ranks that use {engine.gpu_memory_utilization:.3g} of one each; start "
            "anew with a lower --gpu-memory-utilization",
            param="ranks",
        )
