"""What one rank holds beside its KV cache: `RankBytes`, of the host's memory or of a GPU's. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from switchgear_runtime.config import EngineConfig
from switchgear_runtime.cuda.device_footprint import device_bytes_of
from switchgear_runtime.model.footprint import DenseBytes, dense_bytes, slot_bytes, slots_per_layer, step_bytes_bound
from switchgear_runtime.model.spec import DecoderSpec

PROCESS_BYTES = 256 << 20  # Python, torch and (for Ray actors) Ray: 165 to 240 MiB measured


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """What one rank holds beside its KV cache, in the memory that is asked about: the host's, or a GPU's."""

    dense: DenseBytes
    dense_shared: int  # once a host
    expert: int
    slots_per_layer: int
    num_slots: int
    exchange: int
    step: int
    process: int

    @property
    def pool(self) -> int:
        return self.num_slots * self.expert

    @property
    def total(self) -> int:
        return self.dense.total + self.pool + self.exchange + self.step + self.process


def on_host(
    spec: DecoderSpec, engine: EngineConfig, dtype: str, *, num_ranks: int, survive: int, segment: int, length: int
) -> RankBytes:
    dense = dense_bytes(spec, dtype, engine.quantization, num_positions=length)
    slots = slots_per_layer(spec, num_ranks - survive)
    step = step_bytes_bound(
        spec,
        dtype,
        num_ranks=num_ranks,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
    )
    return RankBytes(
        dense=dense,
        dense_shared=dense.shared if engine.weight_cache_dir != "" else 0,
        expert=slot_bytes(spec, dtype, engine.quantization),
        slots_per_layer=slots,
        num_slots=spec.num_moe_layers * slots,
        exchange=-(-segment // num_ranks),
        step=step,
        process=PROCESS_BYTES,
    )


def on_gpu(spec: DecoderSpec, engine: EngineConfig, *, num_ranks: int, survive: int, length: int) -> RankBytes:
    """With a slot more a layer, where migrations stage, and those for live swaps, which the pool has from the start."""
    found = device_bytes_of(spec, engine, num_ranks=num_ranks, num_positions=length, survive=survive)
    return RankBytes(
        dense=found.dense,
        dense_shared=0,
        expert=found.slot,
        slots_per_layer=slots_per_layer(spec, num_ranks - survive),
        num_slots=found.num_slots,
        exchange=found.exchange,
        step=found.step + found.small_steps,
        process=found.process,
    )
