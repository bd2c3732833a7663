"""Subjects of `bench kernels`: drawing a token from each row of logits, greedy and by nucleus."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from switchgear_bench.kernel_subject import Baseline, Subject, call_rows, num_copies, spoil, words
from switchgear_runtime import ops_reference

BATCHES = (1, 8, 32)
VOCAB_SIZE = 32_000

_POINTERS = (
    "temperature_B",
    "top_p_B",
    "min_p_B",
    "presence_B",
    "frequency_B",
    "repetition_B",
    "top_k_B",
    "seeds_B",
    "positions_B",
    "history",
    "history_offsets",
    "prompt_lens_B",
    "bias_ids",
    "bias_values",
    "bias_offsets",
    "banned_ids",
    "banned_offsets",
    "num_logprobs_B",
)


class _Arguments(ctypes.Structure):
    """Mirror of sg_sample_args (csrc/kernels/ops.h)."""

    _fields_ = [
        ("logits_BV", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("num_history", ctypes.c_int64),
        ("num_bias", ctypes.c_int64),
        ("num_banned", ctypes.c_int64),
        ("num_top", ctypes.c_int64),
        ("token_ids_B", ctypes.c_void_p),
        ("logprob_B", ctypes.c_void_p),
        ("top_ids_BN", ctypes.c_void_p),
        ("top_logprobs_BN", ctypes.c_void_p),
    ]


def subjects(arena_bytes: int, batches: Sequence[int] = BATCHES, vocab_size: int = VOCAB_SIZE) -> Iterator[Subject]:
    for batch in batches:
        yield _subject(batch, vocab_size, arena_bytes, temperature=0.0, top_p=1.0)
        yield _subject(batch, vocab_size, arena_bytes, temperature=0.8, top_p=0.95)


def _subject(batch: int, vocab_size: int, arena_bytes: int, *, temperature: float, top_p: float) -> Subject:
    generator = torch.Generator().manual_seed(batch)
    logits_BV = torch.randn(batch, vocab_size, generator=generator) * 3
    copies = num_copies(4 * logits_BV.numel(), arena_bytes)
    arena = logits_BV.repeat(copies, 1, 1)
    sampling = _sampling(batch, temperature, top_p)
    token_ids, logprob = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    arguments = [
        _Arguments(
            arena[i].data_ptr(),
            batch,
            vocab_size,
            *(sampling[name].data_ptr() for name in _POINTERS),
            0,
            0,
            0,
            0,
            token_ids.data_ptr(),
            logprob.data_ptr(),
            None,
            None,
        )
        for i in range(copies)
    ]

    def check() -> None:
        expected = ops_reference.sample(logits_BV, **sampling)[0]
        assert torch.equal(token_ids, expected), f"tokens {token_ids.tolist()} instead of {expected.tolist()}"

    greedy = temperature == 0.0
    return Subject(
        kernel="sampler",
        op="sample",
        format="f32",
        shape=f"{'greedy' if greedy else f'temperature {temperature}, top_p {top_p}'}, vocabulary {vocab_size}",
        num_tokens=batch,
        calls=call_rows([words(one) for one in arguments]),
        num_bytes=4.0 * logits_BV.numel(),
        flops=float(logits_BV.numel()) * (1 if greedy else 3),
        arithmetic="float32",
        source="memory",
        prepare=lambda: spoil(token_ids),
        check=check,
        baseline=Baseline(name="torch argmax", run=lambda i: arena[i % copies].argmax(-1)) if greedy else None,
        keep=(arena, sampling, arguments, logprob),
    )


def _sampling(batch: int, temperature: float, top_p: float) -> dict[str, Tensor]:
    """No penalties, biases or logprobs."""
    zeros, ones = torch.zeros(batch), torch.ones(batch)
    nobody = torch.zeros(batch + 1, dtype=torch.int64)
    nothing = torch.empty(0, dtype=torch.int32)
    return {
        "temperature_B": ones * temperature,
        "top_p_B": ones * top_p,
        "min_p_B": zeros,
        "presence_B": zeros,
        "frequency_B": zeros,
        "repetition_B": ones,
        "top_k_B": torch.zeros(batch, dtype=torch.int32),
        "seeds_B": torch.arange(batch, dtype=torch.int64),
        "positions_B": torch.arange(batch, dtype=torch.int64),
        "history": nothing,
        "history_offsets": nobody,
        "prompt_lens_B": torch.zeros(batch, dtype=torch.int64),
        "bias_ids": nothing,
        "bias_values": torch.empty(0),
        "bias_offsets": nobody,
        "banned_ids": nothing,
        "banned_offsets": nobody,
        "num_logprobs_B": torch.full((batch,), -1, dtype=torch.int32),
    }
