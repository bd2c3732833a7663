"""What each rank would hold, and whether that fits, before anything is loaded: `make_plan` gives a `Plan`.

Needs a config.json, no weights and no torch. The sizes of weights and cache are what ModelRunner allocates, byte for
byte (model/footprint.py, and a test); activations are a bound, the process itself is a measured constant. A rank's
numbers are what it needs alone on a host. Ranks of one host map the weight cache's matrices once, all of them, so that
a host needs less than the sum.

Surviving F of R deaths means that any R - F ranks have slots for every expert of every layer: ceil(E / (R - F)) a
layer, where ceil(E / R) would do for all of them. The slots beyond hold replicas until a death.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from switchgear.byte_size import format_bytes
from switchgear.config import RANKS_MAX
from switchgear_runtime.config import EngineConfig
from switchgear_runtime.errors import ConfigError
from switchgear_runtime.model.footprint import (
    DenseBytes,
    dense_bytes,
    kv_block_bytes,
    mailbox_bytes,
    run_dtype,
    segment_bytes,
    slot_bytes,
    slots_per_layer,
    step_bytes_bound,
)
from switchgear_runtime.model.spec import DecoderSpec

KV_TILE = 16  # block_size is a multiple of it
PROCESS_BYTES = 256 << 20  # Python, torch and (for Ray actors) Ray: 165 to 240 MiB measured
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
    max_len_sequences: int  # of max_model_len tokens, at once, in one rank's cache
    mailbox_bytes: int
    segment_bytes: int  # shared memory of one host with all ranks
    segment_share_bytes: int  # a rank's part of it
    step_bytes: int  # a bound
    process_bytes: int
    total_bytes: int
    cluster_bytes: int  # all ranks, each on a host of its own
    host_bytes: int  # all ranks on one host; with a weight cache it has each matrix once
    memory_bytes: int | None
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


def _kv_blocks(spec: DecoderSpec, engine: EngineConfig, dtype: str) -> tuple[int, int]:
    """(blocks, max_model_len), as ModelRunner decides them."""
    block = kv_block_bytes(spec, dtype, engine.block_size)
    num_blocks = engine.num_kv_blocks or engine.kv_cache_memory_bytes // block
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
    dtype = run_dtype(spec, engine.dtype)
    num_blocks, max_model_len = _kv_blocks(spec, engine, dtype)
    dense = dense_bytes(spec, dtype, engine.quantization, num_positions=max_model_len)
    slots = slots_per_layer(spec, num_ranks - survive)
    expert = slot_bytes(spec, dtype, engine.quantization)
    pool = spec.num_moe_layers * slots * expert
    block = kv_block_bytes(spec, dtype, engine.block_size)
    mailbox = mailbox_bytes(spec, dtype, engine.max_num_batched_tokens, num_ranks)
    segment = segment_bytes(num_ranks, mailbox) if num_ranks > 1 else 0
    step = step_bytes_bound(
        spec,
        dtype,
        num_ranks=num_ranks,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
    )
    share = -(-segment // num_ranks)
    own = dense.total - dense.shared + num_blocks * block + share + step + PROCESS_BYTES
    total = own + dense.shared + pool
    is_shared = engine.weight_cache_dir != ""
    experts = spec.num_moe_layers * spec.num_experts * expert
    weights = dense.shared + experts if is_shared else num_ranks * (dense.shared + pool)
    return Plan(
        model=model,
        architecture=spec.architecture,
        dtype=dtype,
        quantization=engine.quantization,
        num_ranks=num_ranks,
        survive=survive,
        num_moe_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.moe.top_k,
        dense=dense,
        dense_bytes=dense.total,
        dense_shared_bytes=dense.shared if is_shared else 0,
        expert_bytes=expert,
        slots_per_layer=slots,
        slots_per_rank=spec.num_moe_layers * slots,
        pool_bytes=pool,
        survive_extra_bytes=pool - spec.num_moe_layers * slots_per_layer(spec, num_ranks) * expert,
        kv_block_bytes=block,
        num_kv_blocks=num_blocks,
        kv_cache_bytes=num_blocks * block,
        kv_cache_tokens=num_blocks * engine.block_size,
        max_model_len=max_model_len,
        max_len_sequences=num_blocks // -(-max_model_len // engine.block_size),
        mailbox_bytes=mailbox,
        segment_bytes=segment,
        segment_share_bytes=share,
        step_bytes=step,
        process_bytes=PROCESS_BYTES,
        total_bytes=total,
        cluster_bytes=num_ranks * total,
        host_bytes=num_ranks * own + weights,
        memory_bytes=memory_bytes,
        fits=None if memory_bytes is None else total <= memory_bytes,
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
    if plan.memory_bytes is None:
        return None
    low, high = -(-(engine.max_model_len or 1) // engine.block_size) - 1, plan.memory_bytes // plan.kv_block_bytes + 1
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
        for quantization in ("int8", "int4"):
            if plan.quantization == "none" and sizes(engine=replace(engine, quantization=quantization)).fits:
                found.append(f"--quantization {quantization} (not the same tokens as bfloat16)")
                break
    found.append(f"{format_bytes(plan.total_bytes)} of memory per rank")
    return found
