"""Incremental text equals one decode of all tokens, whatever they are: split characters, invalid bytes, specials."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from switchgear.config import bundled_model
from switchgear.server.detokenizer import Detokenizer
from switchgear.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.load(bundled_model())
    assert tokenizer is not None
    return tokenizer


def pieces(tokenizer: Tokenizer, token_ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context or [])
    return [*map(detokenizer.append, token_ids), detokenizer.flush()]


@given(text=st.text(max_size=60))
def test_any_text_comes_back_whole_and_without_broken_characters(tokenizer: Tokenizer, text: str) -> None:
    deltas = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_equal_one_decode(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    byte_ids = [i for i in range(3, tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
    token_ids = [
        draw.choice(byte_ids) if draw.random() < 0.7 else draw.randrange(tokenizer.vocab_size) for _ in range(300)
    ]
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids), f"seed {seed}"


def test_a_character_is_emitted_by_its_last_token(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("\U0001f600!")
    assert len(token_ids) == 5
    assert pieces(tokenizer, token_ids) == ["", "", "", "\U0001f600", "!", ""]
    assert pieces(tokenizer, token_ids[:2]) == ["", "", "\ufffd"]


def test_one_byte_forever_costs_a_bounded_window(tokenizer: Tokenizer) -> None:
    lonely = tokenizer.encode("\U0001f600")[1]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.append(lonely) for _ in range(2000)) + detokenizer.flush()
    assert text == "\ufffd" * 2000
    assert len(detokenizer._window) <= 24


def test_special_tokens_show_nothing(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one")
    assert "".join(pieces(tokenizer, [0, *token_ids, 0, *token_ids])) == "oneone"


def test_a_leading_space_survives_a_decoder_that_strips_it() -> None:
    """SentencePiece-like vocabularies: the output goes on from the prompt, it does not start a text."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "<0xC3>": 3, "<0xA9>": 4}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(raw)
    assert "".join(pieces(tokenizer, [2, 3, 4, 2], context=[1])) == " world\u00e9 world"
    assert "".join(pieces(tokenizer, [2, 2])) == "world world"
