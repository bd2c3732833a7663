"""From logits to tokens: `Sampler` lays out each sequence's sampling parameters for `ops.sample`.

A token depends on the row of logits and on the request alone: the generator is keyed by the request's seed and by the
index of the output token, so neither rank, step, batch mates nor a preemption can change it.

Letters: B sequences that sample in this step (the rows of the logits), V vocabulary, N most top logprobs one wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.batch import Batch, SampledToken
from switchgear_runtime.sequence import Sequence


class Sampler:
    """Callable. Keeps the layout of the last batch: while the same sequences decode, only their positions change."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._arguments: dict[str, Any] = {}

    def __call__(self, logits_BV: Tensor, batch: Batch) -> list[SampledToken]:
        return self.of(logits_BV, batch.sampling)

    def of(
        self, logits_BV: Tensor, sequences: list[Sequence], layout: dict[str, Any] | None = None
    ) -> list[SampledToken]:
        """A token for each row. `layout`: of the sequences as they were before tokens were added to them."""
        assert logits_BV.shape[0] == len(sequences), (logits_BV.shape, len(sequences))
        if not sequences:
            return []
        ids_B, logprob_B, top_ids_BN, top_logprobs_BN = ops.sample(logits_BV, **(layout or self.layout(sequences)))
        return [
            _sampled(sequence, token_id, logprob, top_ids, top_logprobs)
            for sequence, token_id, logprob, top_ids, top_logprobs in zip(
                sequences,
                ids_B.tolist(),
                logprob_B.tolist(),
                top_ids_BN.tolist(),
                top_logprobs_BN.tolist(),
                strict=True,
            )
        ]

    def layout(self, sequences: list[Sequence]) -> dict[str, Any]:
        """The arguments of ops.sample for their next tokens."""
        known = self._sequences
        if len(known) == len(sequences) and all(map(is_, known, sequences)):
            return self._arguments | {"positions_B": _positions(sequences)}
        arguments = _arguments(sequences)
        lasts = not any(_has_penalties(sequence) or sequence.sampling.min_tokens for sequence in sequences)
        self._sequences, self._arguments = (sequences, arguments) if lasts else ([], {})
        return arguments


def _positions(sequences: list[Sequence]) -> Tensor:
    return torch.from_numpy(np.array([sequence.num_output_tokens for sequence in sequences], np.int64))  # half the time


def _arguments(sequences: list[Sequence]) -> dict[str, Any]:
    sampling = [sequence.sampling for sequence in sequences]
    history, history_offsets = _ragged([_history(sequence) for sequence in sequences], torch.int32)
    bias_ids, bias_offsets = _ragged([params.logit_bias.keys() for params in sampling], torch.int32)
    bias_values, _ = _ragged([params.logit_bias.values() for params in sampling], torch.float32)
    banned_ids, banned_offsets = _ragged([_banned(sequence) for sequence in sequences], torch.int32)
    return {
        "temperature_B": torch.tensor([params.temperature for params in sampling], dtype=torch.float32),
        "top_k_B": torch.tensor([top_k_or_all(params.top_k) for params in sampling], dtype=torch.int32),
        "top_p_B": torch.tensor([params.top_p for params in sampling], dtype=torch.float32),
        "min_p_B": torch.tensor([params.min_p for params in sampling], dtype=torch.float32),
        "presence_B": torch.tensor([params.presence_penalty for params in sampling], dtype=torch.float32),
        "frequency_B": torch.tensor([params.frequency_penalty for params in sampling], dtype=torch.float32),
        "repetition_B": torch.tensor([params.repetition_penalty for params in sampling], dtype=torch.float32),
        "seeds_B": torch.tensor([signed_seed(params.seed) for params in sampling], dtype=torch.int64),
        "positions_B": _positions(sequences),
        "history": history,
        "history_offsets": history_offsets,
        "prompt_lens_B": torch.tensor(
            [sequence.num_prompt_tokens if _has_penalties(sequence) else 0 for sequence in sequences], dtype=torch.int64
        ),
        "bias_ids": bias_ids,
        "bias_values": bias_values,
        "bias_offsets": bias_offsets,
        "banned_ids": banned_ids,
        "banned_offsets": banned_offsets,
        "num_logprobs_B": torch.tensor(
            [-1 if params.logprobs is None else params.logprobs for params in sampling], dtype=torch.int32
        ),
    }


def _sampled(
    sequence: Sequence, token_id: int, logprob: float, top_ids: list[int], top_logprobs: list[float]
) -> SampledToken:
    num_logprobs = sequence.sampling.logprobs
    if num_logprobs is None:
        return SampledToken(token_id)
    top = list(zip(top_ids, top_logprobs, strict=True))[:num_logprobs]
    return SampledToken(token_id, logprob, top)


def _ragged(rows: list[Iterable[Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of any length, end to end, and offsets [B + 1]."""
    values: list[Any] = []
    offsets = [0]
    for row in rows:
        values.extend(row)
        offsets.append(len(values))
    return torch.tensor(values, dtype=dtype), torch.tensor(offsets, dtype=torch.int64)


def _history(sequence: Sequence) -> Iterable[int]:
    return sequence.token_ids if _has_penalties(sequence) else ()  # only penalties read it


def needs_host(sequence: Sequence) -> bool:
    """Whether its next token takes more than a device's sampler knows: logits that are changed first, or logprobs. By the
    request and the token's index alone."""
    sampling = sequence.sampling
    return (
        sampling.logprobs is not None
        or bool(sampling.logit_bias)
        or _has_penalties(sequence)
        or sequence.num_output_tokens < sampling.min_tokens
    )


def _has_penalties(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def _banned(sequence: Sequence) -> Iterable[int]:
    sampling = sequence.sampling
    return sampling.stop_token_ids if sequence.num_output_tokens < sampling.min_tokens else ()


def top_k_or_all(top_k: int) -> int:
    """0 and -1 mean all tokens, and so does any number beyond int32."""
    return top_k if 0 < top_k < 1 << 31 else 0


def signed_seed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
