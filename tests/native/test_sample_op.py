"""sample: the published Philox vectors, the twin's tokens, row independence, and each parameter's meaning."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from switchgear_runtime import native, ops, ops_reference

# Random123's known-answer tests (kat_vectors, philox4x32-10): counter, key, output.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def arguments(batch: int, **changes: Any) -> dict[str, Tensor]:
    """The neutral arguments of `sample` for `batch` rows (greedy, no penalty), with some replaced."""
    f32 = lambda value: torch.full((batch,), float(value))  # noqa: E731
    ragged = {
        "history": torch.empty(0, dtype=torch.int32),
        "bias_ids": torch.empty(0, dtype=torch.int32),
        "bias_values": torch.empty(0),
        "banned_ids": torch.empty(0, dtype=torch.int32),
    }
    offsets = {name: torch.zeros(batch + 1, dtype=torch.int64) for name in ("history", "bias", "banned")}
    return {
        "temperature_B": f32(0),
        "top_k_B": torch.zeros(batch, dtype=torch.int32),
        "top_p_B": f32(1),
        "min_p_B": f32(0),
        "presence_B": f32(0),
        "frequency_B": f32(0),
        "repetition_B": f32(1),
        "seeds_B": torch.arange(batch, dtype=torch.int64),
        "positions_B": torch.zeros(batch, dtype=torch.int64),
        "prompt_lens_B": torch.zeros(batch, dtype=torch.int64),
        "num_logprobs_B": torch.full((batch,), -1, dtype=torch.int32),
        **ragged,
        **{f"{name}_offsets": value for name, value in offsets.items()},
        **changes,
    }


def random_arguments(seed: int, batch: int, vocab_size: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (batch,), generator=g)]

    def ragged(most: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(0, min(most, vocab_size) + 1, (batch,), generator=g)
        ids = [torch.randperm(vocab_size, generator=g)[:n] for n in lengths.tolist()]
        return torch.cat(ids).to(torch.int32), torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int64)

    history_lengths = torch.randint(0, 40, (batch,), generator=g)
    bias_ids, bias_offsets = ragged(5)
    banned_ids, banned_offsets = ragged(3)
    history = torch.randint(0, vocab_size, (int(history_lengths.sum()),), generator=g).to(torch.int32)
    return {
        "temperature_B": choose(0.0, 0.3, 1.0, 2.5),
        "top_k_B": choose(0, -1, 1, 3, 50, 10**6).to(torch.int32),
        "top_p_B": choose(1.0, 0.9, 0.5, 0.01),
        "min_p_B": choose(0.0, 0.0, 0.05, 1.0),
        "presence_B": choose(0.0, 0.5, -1.0),
        "frequency_B": choose(0.0, 0.25, -0.5),
        "repetition_B": choose(1.0, 1.3, 0.7),
        "seeds_B": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        "positions_B": torch.randint(0, 5000, (batch,), generator=g),
        "history": history,
        "history_offsets": torch.cat([torch.zeros(1), history_lengths.cumsum(0)]).to(torch.int64),
        "prompt_lens_B": (history_lengths * torch.rand(batch, generator=g)).long(),
        "bias_ids": bias_ids,
        "bias_values": torch.randn(len(bias_ids), generator=g) * 3,
        "bias_offsets": bias_offsets,
        "banned_ids": banned_ids,
        "banned_offsets": banned_offsets,
        "num_logprobs_B": choose(-1, 0, 1, 5, 20).to(torch.int32),
    }


def row_of(args: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """The arguments of row b alone."""
    row = {name: value[b : b + 1] for name, value in args.items() if name.endswith("_B")}
    for name, values in {"history": ["history"], "bias": ["bias_ids", "bias_values"], "banned": ["banned_ids"]}.items():
        low, high = args[f"{name}_offsets"][b : b + 2].tolist()
        row[f"{name}_offsets"] = torch.tensor([0, high - low])
        row.update({value: args[value][low:high] for value in values})
    return row


def test_philox_vectors() -> None:
    words4, words2 = ctypes.c_uint32 * 4, ctypes.c_uint32 * 2
    for counter, key, expected in PHILOX_VECTORS:
        assert ops_reference.philox_4x32_10(counter, key) == expected
        out = words4()
        native.core().sg_philox(words4(*counter), words2(*key), out)
        assert tuple(out) == expected


@pytest.mark.parametrize("seed", range(6))
def test_tokens_equal_twin(seed: int, same_bits_everywhere: Callable[..., None]) -> None:
    torch.manual_seed(seed)
    batch, vocab_size = [(40, 1), (60, 7), (60, 64), (60, 1000), (30, 5000), (60, 200)][seed]
    logits_BV = torch.randn(batch, vocab_size) * 3
    if seed == 5:  # many ties
        logits_BV = logits_BV.round()
    args = random_arguments(seed, batch, vocab_size)
    before = logits_BV.clone()
    token_ids, logprob, top_ids, top_logprobs = ops.sample(logits_BV, **args)
    assert torch.equal(logits_BV, before)
    twin_ids, twin_logprob, twin_top_ids, twin_top_logprobs = ops_reference.sample(logits_BV, **args)
    assert torch.equal(token_ids, twin_ids)
    assert torch.equal(top_ids, twin_top_ids)
    assert (logprob - twin_logprob).abs().max() < 2e-6
    assert torch.equal(top_logprobs.isinf(), twin_top_logprobs.isinf())
    finite = twin_top_logprobs.isfinite()
    assert (top_logprobs[finite] - twin_top_logprobs[finite]).abs().max() < 2e-6
    same_bits_everywhere(lambda: ops.sample(logits_BV, **args))


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(11)
    logits_BV = torch.randn(25, 300) * 3
    args = random_arguments(11, 25, 300)
    token_ids, logprob, top_ids, _ = ops.sample(logits_BV, **args)
    for b in range(25):
        alone = ops.sample(logits_BV[b : b + 1], **row_of(args, b))
        assert alone[0].item() == token_ids[b].item()
        assert alone[1].item() == logprob[b].item()
        count = alone[2].shape[1]
        assert torch.equal(alone[2][0], top_ids[b, :count])


def test_draws_follow_the_distribution() -> None:
    """100,000 draws by position: each token's share within five standard deviations of its probability."""
    n = 100_000
    logits_V = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    args = arguments(n, temperature_B=torch.full((n,), 0.8), positions_B=torch.arange(n))
    args["seeds_B"] = torch.full((n,), 42)
    token_ids = ops.sample(logits_V.repeat(n, 1), **args)[0]
    probability = (logits_V.double() / 0.8).softmax(0)
    share = torch.bincount(token_ids, minlength=5) / n
    assert ((share - probability).abs() < 5 * (probability * (1 - probability) / n).sqrt()).all()
    args["seeds_B"] = torch.full((n,), 43)
    assert not torch.equal(ops.sample(logits_V.repeat(n, 1), **args)[0], token_ids)


def test_greedy_ties_and_odd_values() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [1.0, 3.0, 3.0],
        [nan, -5.0, -7.0],
        [-inf, -inf, -inf],
        [0.0, -0.0, -1.0],
        [-0.0, 0.0, -1.0],
        [1.0, inf, 2.0],
    ]
    expected = [1, 1, 0, 0, 0, 1]
    logits_BV = torch.tensor(rows)
    assert ops.sample(logits_BV, **arguments(6))[0].tolist() == expected
    hot = ops.sample(logits_BV, **arguments(6, temperature_B=torch.full((6,), 1e-4)))[0].tolist()
    assert hot[1:3] + hot[5:] == [1, 0, 1]
    assert hot[0] in (1, 2)


def test_banned_tokens_are_never_drawn() -> None:
    n = 2000
    args = arguments(n, temperature_B=torch.full((n,), 100.0), positions_B=torch.arange(n))
    args["banned_ids"] = torch.tensor([0, 2, 3], dtype=torch.int32).repeat(n)
    args["banned_offsets"] = torch.arange(n + 1) * 3
    assert set(ops.sample(torch.zeros(n, 5), **args)[0].tolist()) == {1, 4}


def test_bad_arguments_raise() -> None:
    logits_BV = torch.zeros(2, 10)
    bad: list[tuple[str, Any, str]] = [
        ("temperature_B", torch.tensor([0.0, -1.0]), r"temperature_B\[1\]"),
        ("temperature_B", torch.tensor([0.0, float("nan")]), r"temperature_B\[1\]"),
        ("repetition_B", torch.tensor([0.0, 1.0]), r"repetition_B\[0\]"),
        ("top_k_B", torch.zeros(2), "top_k_B"),
        ("seeds_B", torch.zeros(3, dtype=torch.int64), "seeds_B"),
        ("history_offsets", torch.tensor([0, 0, 1]), "history offsets"),
        ("prompt_lens_B", torch.tensor([0, 1]), r"prompt_lens_B\[1\]"),
    ]
    for name, value, match in bad:
        with pytest.raises(ValueError, match=match):
            ops.sample(logits_BV, **arguments(2, **{name: value}))
    for token_id in (-1, 10):
        ids = torch.tensor([token_id], dtype=torch.int32)
        offsets = torch.tensor([0, 1, 1])
        with pytest.raises(ValueError, match=rf"history\[0\]={token_id}"):
            ops.sample(logits_BV, **arguments(2, history=ids, history_offsets=offsets))
        with pytest.raises(ValueError, match=rf"banned_ids\[0\]={token_id}"):
            ops.sample(logits_BV, **arguments(2, banned_ids=ids, banned_offsets=offsets))
    ids = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="offsets fall"):
        ops.sample(logits_BV, **arguments(2, banned_ids=ids, banned_offsets=torch.tensor([0, 4, 3])))
    assert ops.sample(torch.zeros(0, 10), **arguments(0))[0].shape == (0,)
