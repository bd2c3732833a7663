"""From the logits of prompt positions to prompt logprobs: `score_prompts`.

Position p of a prompt says how likely token p + 1 was; token 0 has no logprob. Same formula, same order of operations
as the logprobs of sampled tokens, so a prompt that ends in a completion gives its logprobs bit for bit.

Letters: C rows of one chunk, V vocabulary, N most alternatives one wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import torch
from torch import Tensor

from switchgear_runtime import ops
from switchgear_runtime.batch import Batch
from switchgear_runtime.messages import PromptLogprobs

POSITIONS_PER_FRAME = 1 << 14  # with 20 alternatives each, well below the limit of a frame
Scored = tuple[float, list[tuple[int, float]]]  # a token's logprob and the likeliest alternatives


def score_prompts(prompt_logits: Iterable[Tensor], batch: Batch) -> list[PromptLogprobs]:
    """What this step says of its prompts. `prompt_logits`: the rows of FlatBatch.prompt_rows, chunk by chunk."""
    next_ids: list[int] = []
    num_logprobs: list[int] = []
    for entry in batch.unscored:
        next_ids += [entry.sequence.token_ids[position + 1] for position in entry.unscored]
        num_logprobs += [entry.sequence.sampling.prompt_logprobs or 0] * len(entry.unscored)
    scored: list[Scored] = []
    for logits_CV in prompt_logits:
        chunk = slice(len(scored), len(scored) + logits_CV.shape[0])
        scored += _score(logits_CV, next_ids[chunk], num_logprobs[chunk])
    rows = iter(scored)
    outputs: list[PromptLogprobs] = []
    for entry in batch.unscored:
        tokens = [next(rows) for _ in entry.unscored]
        outputs.append(
            PromptLogprobs(
                sequence_id=entry.sequence.sequence_id,
                incarnation=entry.sequence.incarnation,
                start=entry.unscored.start + 1,
                logprobs=[logprob for logprob, _ in tokens],
                top_logprobs=[top for _, top in tokens],
            )
        )
    assert next(rows, None) is None, "more rows of logits than prompt positions"
    return outputs


def frames_of(parts: list[PromptLogprobs]) -> list[list[PromptLogprobs]]:
    """The same in order, in one list per frame to send; at least one list, perhaps empty."""
    frames: list[list[PromptLogprobs]] = [[]]
    room = POSITIONS_PER_FRAME
    for part in parts:
        begin = 0
        while begin < len(part.logprobs):
            if room == 0:
                frames.append([])
                room = POSITIONS_PER_FRAME
            span = slice(begin, begin + room)
            piece = msgspec.structs.replace(
                part,
                start=part.start + begin,
                logprobs=part.logprobs[span],
                top_logprobs=part.top_logprobs[span],
            )
            frames[-1].append(piece)
            begin += len(piece.logprobs)
            room -= len(piece.logprobs)
    return frames


def _score(logits_CV: Tensor, next_ids: list[int], num_logprobs: list[int]) -> list[Scored]:
    logprobs = ops.log_softmax_at(logits_CV, torch.tensor(next_ids, dtype=torch.int64)).tolist()
    if not any(num_logprobs):
        return [(logprob, []) for logprob in logprobs]
    _, _, top_ids_CN, top_logprobs_CN = ops.sample(logits_CV, **_greedy(num_logprobs))
    return [
        (logprob, list(zip(ids, top, strict=True))[:num])
        for logprob, num, ids, top in zip(
            logprobs, num_logprobs, top_ids_CN.tolist(), top_logprobs_CN.tolist(), strict=True
        )
    ]


def _greedy(num_logprobs: list[int]) -> dict[str, Any]:
    """Arguments of `ops.sample` for rows of which only the likeliest tokens are wanted."""
    num_rows = len(num_logprobs)
    zeros_f32, ones_f32 = torch.zeros(num_rows), torch.ones(num_rows)
    zeros_i64 = torch.zeros(num_rows, dtype=torch.int64)
    no_ids, offsets = torch.zeros(0, dtype=torch.int32), torch.zeros(num_rows + 1, dtype=torch.int64)
    return {
        "temperature_B": zeros_f32,
        "top_k_B": torch.zeros(num_rows, dtype=torch.int32),
        "top_p_B": ones_f32,
        "min_p_B": zeros_f32,
        "presence_B": zeros_f32,
        "frequency_B": zeros_f32,
        "repetition_B": ones_f32,
        "seeds_B": zeros_i64,
        "positions_B": zeros_i64,
        "history": no_ids,
        "history_offsets": offsets,
        "prompt_lens_B": zeros_i64,
        "bias_ids": no_ids,
        "bias_values": torch.zeros(0),
        "bias_offsets": offsets,
        "banned_ids": no_ids,
        "banned_offsets": offsets,
        "num_logprobs_B": torch.tensor(num_logprobs, dtype=torch.int32),
    }
