"""Text to token ids and back: a thin, typed wrapper of the `tokenizers` library. Thread-safe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from switchgear_runtime.errors import CheckpointError


class Tokenizer:
    """The tokenizer of one checkpoint (`tokenizer.json`)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # a checkpoint's file may ask for either; both would change prompts in silence
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        # No text of n characters takes fewer than n / token_chars_max tokens: a length check that costs no tokenizing.
        self.token_chars_max: int = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer | None:
        """None where the checkpoint has no tokenizer.json; then only token ids go in and come out."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
            raise CheckpointError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token_id: int) -> str:
        """One token by itself, as logprobs name it; special tokens show."""
        return self.decode((token_id,), skip_special=False)
