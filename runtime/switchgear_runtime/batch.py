"""What runs together in one step of one rank: `Batch`, and its flat form for the model. Imports no torch.

Letters: T tokens of the batch, S sequences, B the widest block table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from switchgear_runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of `sequence`. `samples`: they reach its last token, so a new one is drawn."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def unscored(self) -> range:
        """Positions whose logits give prompt logprobs."""
        return self.sequence.unscored(self.start, self.end)


class SampledToken(NamedTuple):
    """What the sampler drew for one sequence. `top_logprobs`: best first, ties to the lowest id."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatBatch:
    """The batch as plain lists. Example: block_size 16, a sequence with block_table [5, 2], its tokens 15 and 16:

    positions_T [15, 16], slots_T [5*16+15, 2*16+0], seq_ids_T [0, 0], block_tables_S [[5, 2]], sampling_rows [1].
    """

    token_ids_T: list[int]
    positions_T: list[int]
    seq_ids_T: list[int]  # index into block_tables_S
    slots_T: list[int]  # block * block_size + offset
    block_tables_S: list[array[int]]  # the sequences' own, not to be kept (block_tables.py makes rows of them)
    sampling_rows: list[int]  # index into T of each sampling sequence's last token
    prompt_rows: list[int] = field(default_factory=list)  # index into T of each token that scores the next one
    versions_S: list[int] = field(default_factory=list)  # of the model, by sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """May be empty: a rank without work still takes part in every MoE layer of a step."""

    scheduled: tuple[ScheduledSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the logits' rows."""
        return [entry.sequence for entry in self.scheduled if entry.samples]

    @property
    def unscored(self) -> list[ScheduledSequence]:
        """The entries with prompt logprobs to give, in the order of FlatBatch.prompt_rows."""
        return [entry for entry in self.scheduled if entry.unscored]

    def tenants(self) -> tuple[list[str], list[int]]:
        """(tenant, number of tokens) of each entry, as two lists."""
        return [entry.sequence.tenant for entry in self.scheduled], [entry.num_tokens for entry in self.scheduled]

    def __iter__(self) -> Iterator[ScheduledSequence]:
        return iter(self.scheduled)

    def __len__(self) -> int:
        return len(self.scheduled)

    def flatten(self, block_size: int) -> FlatBatch:
        token_ids_T: list[int] = []
        positions_T: list[int] = []
        seq_ids_T: list[int] = []
        slots_T: list[int] = []
        sampling_rows: list[int] = []
        prompt_rows: list[int] = []
        block_tables_S: list[array[int]] = []
        for seq_id, entry in enumerate(self.scheduled):
            table = entry.sequence.block_table
            prompt_rows += [len(token_ids_T) + position - entry.start for position in entry.unscored]
            token_ids_T += entry.sequence.token_ids[entry.start : entry.end]
            positions_T += range(entry.start, entry.end)
            seq_ids_T += [seq_id] * entry.num_tokens
            slots_T += [table[p // block_size] * block_size + p % block_size for p in range(entry.start, entry.end)]
            block_tables_S.append(table)
            if entry.samples:
                sampling_rows.append(len(token_ids_T) - 1)
        return FlatBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            seq_ids_T=seq_ids_T,
            slots_T=slots_T,
            block_tables_S=block_tables_S,
            sampling_rows=sampling_rows,
            prompt_rows=prompt_rows,
            versions_S=[entry.sequence.version for entry in self.scheduled],
        )
