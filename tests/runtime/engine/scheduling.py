"""Makers of requests, and `KVOracle`: an independent model of what must lie in every slot of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from switchgear_runtime.batch import Batch, SampledToken
from switchgear_runtime.block_manager import BlockManager
from switchgear_runtime.messages import Submit, WireSampling
from switchgear_runtime.scheduler import Scheduler
from switchgear_runtime.sequence import Sequence

VOCAB_SIZE = 8  # few tokens, so that prefixes meet by chance


def make_sampling(**changes: Any) -> WireSampling:
    values: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "stop_token_ids": (),
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "seed": 0,
    }
    return WireSampling(**{**values, **changes})


def make_submit(
    sequence_id: int,
    prompt: Items[int],
    *,
    outputs: Items[int] = (),
    incarnation: int = 1,
    tenant: str = "",
    cache_salt: str = "",
    **sampling: Any,
) -> Submit:
    return Submit(
        sequence_id=sequence_id,
        incarnation=incarnation,
        prompt_token_ids=list(prompt),
        output_token_ids=list(outputs),
        sampling=make_sampling(**sampling),
        tenant=tenant,
        cache_salt=cache_salt,
    )


def make_sequence(sequence_id: int, prompt: Items[int], **arguments: Any) -> Sequence:
    return Sequence.from_submit(make_submit(sequence_id, prompt, **arguments))


def make_scheduler(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": 4,
        "enable_prefix_caching": True,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "enable_chunked_prefill": True,
    }
    values |= changes
    blocks = BlockManager(**{name: values.pop(name) for name in ("num_blocks", "block_size", "enable_prefix_caching")})
    return Scheduler(blocks, **values)


def next_token(token_ids: Items[int]) -> int:
    """The model: any function of all tokens so far."""
    return (sum((position + 3) * token for position, token in enumerate(token_ids)) + len(token_ids)) % VOCAB_SIZE


class KVOracle:
    """Slot by slot, what the steps have written. A cell of position p is right when it was written from tokens 0..p.

    `drawn`: tokens of the step before, which the scheduler may not know yet."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[int, object] = {}

    def write(self, batch: Batch, drawn: Items[int] = ()) -> None:
        flat = batch.flatten(self.block_size)
        row = 0
        for entry in batch:
            for position in range(entry.start, entry.end):
                assert flat.token_ids_T[row] == entry.sequence.token_ids[position]
                assert flat.positions_T[row] == position
                self.cells[flat.slots_T[row]] = self._cell(entry.sequence, position, drawn)
                row += 1
        assert row == len(flat.token_ids_T) == batch.num_tokens

    def spoil(self, slots: Items[int]) -> None:
        """A broken step leaves anything in the slots it was given."""
        for slot in slots:
            self.cells[slot] = "spoilt"

    def sample(self, batch: Batch, drawn: Items[int] = ()) -> list[SampledToken]:
        """The tokens of the batch, once every cell that attention would read is found right."""
        flat = batch.flatten(self.block_size)
        sampled = []
        for index, entry in enumerate(batch):
            table = flat.block_tables_S[index]
            for position in range(entry.end):
                slot = table[position // self.block_size] * self.block_size + position % self.block_size
                assert self.cells.get(slot) == self._cell(entry.sequence, position, drawn), (entry, position)
            if entry.samples:
                sampled.append(SampledToken(next_token(_known(entry.sequence, drawn))))
        return sampled

    def _cell(self, sequence: Sequence, position: int, drawn: Items[int]) -> object:
        return sequence.tenant, sequence.cache_salt, tuple(_known(sequence, drawn)[: position + 1])


def _known(sequence: Sequence, drawn: Items[int]) -> list[int]:
    return [drawn[-1 - token_id] if token_id < 0 else token_id for token_id in sequence.token_ids]
