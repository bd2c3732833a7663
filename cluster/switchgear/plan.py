"""What each rank would hold, and whether that fits, before anything is loaded: `make_plan` gives a `Plan`.

Needs a config.json, no weights and no torch. The sizes of weights and cache are what ModelRunner allocates, byte for
byte (model/footprint.py, and a test); activations are a bound, the process itself is a measured constant. A rank's
numbers are what it needs alone on a host. Ranks of one host map the weight cache's matrices once, all of them, so that
a host needs less than the sum.

With device cuda, memory is a GPU's (cuda/device_footprint.py), of which gpu_memory_utilization's part is used, and the KV
cache is what the rest leaves. No GPU has confirmed these sums yet.

Surviving F of R deaths means that any R - F ranks have slots for every expert of every layer: ceil(E / (R - F)) a
layer, where ceil(E / R) would do for all of them. The slots beyond hold replicas until a death.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from switchgear.byte_size import format_bytes
from switchgear.config import RANKS_MAX
from switchgear.rank_memory import RankBytes, on_gpu, on_host
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.device_footprint import GPU_MEMORY_UTILIZATION, useful_cache_bytes
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.footprint import (
    KV_CACHE_BYTES,
    DenseBytes,
    kv_block_bytes,
    mailbox_bytes,
    run_dtype,
    segment_bytes,
)
from switchgear_runtime.model.spec import DecoderSpec

KV_TILE = 16  # block_size is a multiple of it
CHOICES_MAX = 6  # rows of the table of survivable deaths


@dataclass(frozen=True, kw_only=True, slots=True)
class SurviveChoice:
    """What one value of --survive costs."""

    survive: int
    slots_per_rank: int
    pool_bytes: int  # per rank
    extra_bytes: int  # per rank, over survive 0
    total_bytes: int  # a rank's whole need
    fits: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes per rank unless the name says otherwise. `fits` is None where no memory was given."""

    model: str
    architecture: str
    device: str
    dtype: str
    quantization: str
    num_ranks: int
    survive: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    dense: DenseBytes
    dense_bytes: int
    dense_shared_bytes: int  # of dense_bytes: what the ranks of a host have once, with a weight cache
    expert_bytes: int  # one expert of one layer
    slots_per_layer: int
    slots_per_rank: int
    pool_bytes: int
    survive_extra_bytes: int  # of the pool, over survive 0
    kv_block_bytes: int
    num_kv_blocks: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_model_len: int
    max_position_embeddings: int  # the model's own limit
    max_len_sequences: int  # of max_model_len tokens, at once, in one rank's cache
    mailbox_bytes: int
    segment_bytes: int  # shared memory of one host with all ranks
    exchange_bytes: int  # a rank's part of it; on a GPU, what its peers write into
    step_bytes: int  # a bound
    process_bytes: int
    total_bytes: int
    cluster_bytes: int  # all ranks, each on a host of its own
    host_bytes: int  # all ranks on one host; with a weight cache it has each matrix once
    memory_bytes: int | None
    usable_bytes: int | None  # of it
    fits: bool | None
    largest_kv_cache_bytes: int | None  # that would still fit
    survive_choices: tuple[SurviveChoice, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    spec: DecoderSpec,
    engine: EngineConfig,
    *,
    model: str = "",
    num_ranks: int,
    survive: int = 0,
    memory_bytes: int | None = None,
) -> Plan:
    """ConfigError for what serve would refuse, too. `memory_bytes`: what one rank may use."""
    _check(spec, engine, num_ranks, survive, memory_bytes)
    plan = _sizes(spec, engine, model, num_ranks, survive, memory_bytes)
    choices = tuple(
        _choice(_sizes(spec, engine, model, num_ranks, deaths, memory_bytes))
        for deaths in sorted({*range(min(num_ranks, CHOICES_MAX)), survive, num_ranks - 1})
    )
    plan = replace(plan, survive_choices=choices, largest_kv_cache_bytes=_largest_cache(spec, engine, plan))
    return replace(plan, advice=tuple(_advice(spec, engine, plan))) if plan.fits is False else plan


def _check(spec: DecoderSpec, engine: EngineConfig, num_ranks: int, survive: int, memory_bytes: int | None) -> None:
    if not 1 <= num_ranks <= RANKS_MAX:
        raise ConfigError(f"ranks={num_ranks} must be an integer from 1 to {RANKS_MAX}")
    if not 0 <= survive < num_ranks:
        raise ConfigError(
            f"survive={survive} must be from 0 to {num_ranks - 1}: one of {num_ranks} ranks has to remain"
        )
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"memory={memory_bytes} must be above 0 bytes")
    if engine.block_size % KV_TILE:
        raise ConfigError(f"block_size={engine.block_size} must be a multiple of {KV_TILE}")
    if engine.max_model_len is not None and engine.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={engine.max_model_len} is over the model's "
            f"max_position_embeddings={spec.max_position_embeddings}"
        )


def _kv_blocks(spec: DecoderSpec, engine: EngineConfig, dtype: str, left_bytes: int | None) -> tuple[int, int]:
    """(blocks, max_model_len), as ModelRunner decides them. `left_bytes`: what is left for the cache, where nothing else
    says how large it is; a sequence of max_model_len, if that is given, must fit."""
    block = kv_block_bytes(spec, dtype, engine.block_size)
    num_bytes = engine.kv_cache_memory_bytes or KV_CACHE_BYTES
    if engine.kv_cache_memory_bytes is None and left_bytes is not None:
        # As serve: less than one longest sequence lowers the length, but for one that was asked for.
        least = -(-(engine.max_model_len or spec.max_position_embeddings) // engine.block_size) * block
        lowers = engine.max_model_len is None and left_bytes >= block
        num_bytes = left_bytes if lowers else max(left_bytes, least)
    num_blocks = engine.num_kv_blocks or num_bytes // block
    if not num_blocks:
        raise ConfigError(
            f"kv_cache_memory_bytes={engine.kv_cache_memory_bytes} is under one block of {engine.block_size} tokens, "
            f"{block} bytes"
        )
    capacity = num_blocks * engine.block_size
    if engine.max_model_len is not None and engine.max_model_len > capacity:
        raise ConfigError(
            f"max_model_len={engine.max_model_len} does not fit the KV cache of {num_blocks} blocks of "
            f"{engine.block_size} tokens; raise kv_cache_memory_bytes to "
            f"{-(-engine.max_model_len // engine.block_size) * block} or more, or lower max_model_len"
        )
    return num_blocks, engine.max_model_len or min(spec.max_position_embeddings, capacity)


def _sizes(
    spec: DecoderSpec, engine: EngineConfig, model: str, num_ranks: int, survive: int, memory_bytes: int | None
) -> Plan:
    """The numbers, without choices and advice."""
    dtype, is_gpu = run_dtype(spec, engine.dtype), engine.device == "cuda"
    if is_gpu and dtype != "bfloat16":
        raise ConfigError(
            f"device={engine.device!r} computes in bfloat16, and the model is {dtype}; give dtype='bfloat16'"
        )
    mailbox = mailbox_bytes(spec, dtype, engine.max_num_batched_tokens, num_ranks)
    segment = segment_bytes(num_ranks, mailbox) if num_ranks > 1 else 0
    usable = memory_bytes
    if is_gpu and memory_bytes is not None:
        usable = int(memory_bytes * (engine.gpu_memory_utilization or GPU_MEMORY_UTILIZATION))

    def rank_bytes(length: int, deaths: int) -> RankBytes:
        if is_gpu:
            return on_gpu(spec, engine, num_ranks=num_ranks, survive=deaths, length=length)
        return on_host(spec, engine, dtype, num_ranks=num_ranks, survive=deaths, segment=segment, length=length)

    longest = engine.max_model_len or spec.max_position_embeddings
    left = None
    if is_gpu:
        left = min((usable or 0) - rank_bytes(longest, survive).total, useful_cache_bytes(spec, engine))
    num_blocks, max_model_len = _kv_blocks(spec, engine, dtype, left)
    rank, at_least = rank_bytes(max_model_len, survive), rank_bytes(max_model_len, 0)
    block = kv_block_bytes(spec, dtype, engine.block_size)
    total = rank.total + num_blocks * block
    own = total - rank.dense.shared - rank.pool
    experts = spec.num_moe_layers * spec.num_experts * rank.expert
    is_shared = rank.dense_shared > 0
    weights = rank.dense.shared + experts if is_shared else num_ranks * (rank.dense.shared + rank.pool)
    return Plan(
        model=model,
        architecture=spec.architecture,
        device=engine.device,
        dtype=dtype,
        quantization=engine.quantization,
        num_ranks=num_ranks,
        survive=survive,
        num_moe_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.moe.top_k,
        dense=rank.dense,
        dense_bytes=rank.dense.total,
        dense_shared_bytes=rank.dense_shared,
        expert_bytes=rank.expert,
        slots_per_layer=rank.slots_per_layer,
        slots_per_rank=rank.num_slots,
        pool_bytes=rank.pool,
        survive_extra_bytes=rank.pool - at_least.pool,
        kv_block_bytes=block,
        num_kv_blocks=num_blocks,
        kv_cache_bytes=num_blocks * block,
        kv_cache_tokens=num_blocks * engine.block_size,
        max_model_len=max_model_len,
        max_position_embeddings=spec.max_position_embeddings,
        max_len_sequences=num_blocks // -(-max_model_len // engine.block_size),
        mailbox_bytes=mailbox,
        segment_bytes=segment,
        exchange_bytes=rank.exchange,
        step_bytes=rank.step,
        process_bytes=rank.process,
        total_bytes=total,
        cluster_bytes=num_ranks * total,
        host_bytes=num_ranks * own + weights,
        memory_bytes=memory_bytes,
        usable_bytes=usable,
        fits=None if usable is None else total <= usable,
        largest_kv_cache_bytes=None,
        survive_choices=(),
        advice=(),
    )


def _choice(plan: Plan) -> SurviveChoice:
    return SurviveChoice(
        survive=plan.survive,
        slots_per_rank=plan.slots_per_rank,
        pool_bytes=plan.pool_bytes,
        extra_bytes=plan.survive_extra_bytes,
        total_bytes=plan.total_bytes,
        fits=plan.fits,
    )


def _largest_cache(spec: DecoderSpec, engine: EngineConfig, plan: Plan) -> int | None:
    """Bytes of the largest KV cache that fits; None if none does, or no memory was given."""
    if plan.usable_bytes is None:
        return None
    low, high = -(-(engine.max_model_len or 1) // engine.block_size) - 1, plan.usable_bytes // plan.kv_block_bytes + 1
    while high - low > 1:  # `low` fits, or is too few; `high` does not fit (a longer context has longer rotary tables)
        middle = (low + high) // 2
        larger = replace(engine, num_kv_blocks=middle)
        if _sizes(spec, larger, plan.model, plan.num_ranks, plan.survive, plan.memory_bytes).fits:
            low = middle
        else:
            high = middle
    return low * plan.kv_block_bytes if low * engine.block_size >= (engine.max_model_len or 1) else None


def _kv_cache_flag(engine: EngineConfig, plan: Plan, num_bytes: int) -> str:
    """The flag that gives a cache of `num_bytes`, of the two the one in use, and what it does to max_model_len."""
    num_blocks = num_bytes // plan.kv_block_bytes
    flag = f"--num-kv-blocks {num_blocks}" if engine.num_kv_blocks else f"--kv-cache-memory-bytes {num_bytes}"
    capacity = num_blocks * engine.block_size
    return flag if capacity >= plan.max_model_len else f"{flag} (max_model_len falls to {capacity})"


def _advice(spec: DecoderSpec, engine: EngineConfig, plan: Plan) -> list[str]:
    """Single changes that make it fit; the last resort is what it needs."""
    memory = plan.memory_bytes
    assert memory is not None

    def sizes(*, num_ranks: int = plan.num_ranks, survive: int = plan.survive, engine: EngineConfig = engine) -> Plan:
        return _sizes(spec, engine, plan.model, num_ranks, survive, memory)

    found: list[str] = []
    for ranks in range(plan.num_ranks + 1, RANKS_MAX + 1):
        if sizes(num_ranks=ranks).fits:
            found.append(f"--ranks {ranks}")
            break
    for survive in range(plan.survive - 1, -1, -1):
        if sizes(survive=survive).fits:
            found.append(f"--survive {survive}")
            break
    if plan.largest_kv_cache_bytes:
        found.append(_kv_cache_flag(engine, plan, plan.largest_kv_cache_bytes))
    if plan.dtype == "float32" and sizes(engine=replace(engine, dtype="bfloat16")).fits:
        found.append("--dtype bfloat16 (not the same tokens as float32)")
    if plan.dtype == "bfloat16":
        for quantization in ("int8", "int4") if plan.device == "cpu" else ("fp8",):
            if plan.quantization == "none" and sizes(engine=replace(engine, quantization=quantization)).fits:
                found.append(f"--quantization {quantization} (not the same tokens as bfloat16)")
                break
    found.append(f"{format_bytes(-(-plan.total_bytes * memory // (plan.usable_bytes or memory)))} of memory per rank")
    return found
