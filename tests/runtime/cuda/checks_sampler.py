"""Check of sampling on the device against a sorted row in double, on random input."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from arena import Arena, Checked, at

from switchgear_runtime import native
from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.library import DeviceError


def uniform(seed: int, position: int) -> float:
    words = ctypes.c_uint32 * 4
    out = words()
    counter = words(position & 0xFFFFFFFF, position >> 32, 0, 0)
    native.core().sg_philox(counter, (ctypes.c_uint32 * 2)(seed & 0xFFFFFFFF, seed >> 32), out)
    return ((out[0] >> 5) * (1 << 26) + (out[1] >> 6)) / float(1 << 53)


def draw(row_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    row = np.where(np.isnan(row_V), -np.inf, row_V).astype(np.float64)
    ids = np.argsort(-row, kind="stable")
    if temperature == 0.0 or row.max() == -np.inf:
        return int(ids[0])
    if 0 < top_k < len(ids):
        ids = ids[:top_k]
    weights = np.exp((row[ids] - row[ids[0]]) / temperature)
    sums = weights.cumsum()
    keep = len(ids)
    if top_p < 1.0:
        keep = min(keep, int((sums < top_p * sums[-1]).sum()) + 1)
    keep = min(keep, max(1, int((weights >= min_p).sum())))
    return int(ids[min(int((sums[:keep] <= u * sums[keep - 1]).sum()), keep - 1)])


def check_sampler(library: Checked, seed: int) -> None:
    arena = Arena(library, seed)
    rng = arena.rng
    batch, vocab_size = int(rng.integers(1, 5)), int(rng.choice([1, 2, 4, 7, 512, 513, 1300, 2048]))
    logits = rng.standard_normal((batch, vocab_size)) * rng.choice([1.0, 4.0])
    if seed % 3 == 0:
        logits = np.round(logits)  # ties
    if seed % 5 == 0:
        logits[0, rng.integers(vocab_size)] = np.nan
        logits[-1, :] = -np.inf
    if seed % 5 == 1:
        logits[:, ::2] = -0.0
        logits[:, 1::2] = 0.0
    if seed % 5 == 2:
        logits = 1 + rng.integers(0, 4, logits.shape) * 2.0**-23  # one beside the other
    _check(library, arena, seed, logits, {})


def check_large_rows(library: Checked, seed: int) -> None:
    """More keys than a block lists, or as many; and rows whose bounds lie beyond those that it lists."""
    arena = Arena(library, seed)
    rng = arena.rng
    vocab_size = int(rng.choice([8193, 9001, 20000, 33000] if seed % 4 != 2 else [8192, 8193]))
    logits = rng.standard_normal((2, vocab_size)) * 2
    if seed % 4 == 1:
        logits = np.round(logits)  # too many of the lowest
    if seed % 4 == 2:
        logits[0, rng.random(vocab_size) < 0.99] = -np.inf  # some threads have none
        logits[1] = 7.0  # all of them: 8192 fit, more do not
    if seed % 4 == 3:
        logits = logits[:, : 8192 + 1]  # a last part of the parts with one id, which is drawn
        logits[:, -1] += 15
    given: dict[str, Any] = {}
    if seed % 8 == 0:  # top-k takes one key that is not listed: what lies above it is just what is
        logits = 1 + rng.integers(0, 2000, logits.shape) * 2.0**-23
        floors = [min(row[thread::512].max() for thread in range(512)) for row in logits]
        given["top_k_B"] = [(row >= floor).sum() + 1 for row, floor in zip(logits, floors, strict=True)]
    if seed % 8 == 4:  # half of the weight, 9 temperatures below the best
        logits = logits - 27
        logits[:, 0] = 0
        given = {"temperature_B": [3.0, 3.0], "top_p_B": [1.0, 1.0], "min_p_B": [0.0, 0.0], "top_k_B": [0, 0]}
    _check(library, arena, seed, logits, given)


def _check(library: Checked, arena: Arena, seed: int, logits: np.ndarray, given: dict[str, Any]) -> None:
    """Draws tokens of the rows, with parameters of many kinds where these are not given."""
    rng = arena.rng
    batch, vocab_size = logits.shape
    logits_BV = arena.put(logits, np.float32)
    columns = {
        "temperature_B": arena.put(rng.choice([0.0, 0.3, 1.0, 1.0, 3.0], batch), np.float32),
        "top_p_B": arena.put(rng.choice([1.0, 0.5, 0.9, 1e-9], batch), np.float32),
        "min_p_B": arena.put(rng.choice([0.0, 0.0, 0.1, 0.6], batch), np.float32),
        "top_k_B": arena.put(rng.choice([0, -1, 1, 3, 40, vocab_size, 5000], batch), np.int32),
        "seeds_B": arena.put(rng.integers(0, 1 << 62, batch), np.int64),
        "positions_B": arena.put(rng.integers(0, 1 << 34, batch), np.int64),
    }
    for name, values in given.items():
        columns[name][:] = values
    token_ids_B = arena.room(batch, np.int64)
    args = structs.Sample(
        logits_BV=at(logits_BV),
        batch=batch,
        vocab_size=vocab_size,
        token_ids_B=at(token_ids_B),
        **{name: at(column) for name, column in columns.items()},
    )
    library.sg_cuda_sample_rows(ctypes.byref(args), None)
    arena.check()
    for b in range(batch):
        temperature, top_p, min_p, top_k, draw_seed, position = (column[b].item() for column in columns.values())
        expected = draw(logits_BV[b], temperature, top_k, top_p, min_p, uniform(draw_seed, position))
        assert token_ids_B[b] == expected, f"seed {seed}, row {b}: {temperature=} {top_k=} {top_p=} {min_p=}"


def check_vocabularies(library: Checked, _seed: int) -> None:
    for vocab_size in (1, 1 << 23):
        library.sg_cuda_sample_rows(ctypes.byref(structs.Sample(vocab_size=vocab_size)), None)
    for vocab_size in (-1, 0, (1 << 23) + 1):
        with pytest.raises(DeviceError):
            library.sg_cuda_sample_rows(ctypes.byref(structs.Sample(vocab_size=vocab_size)), None)
