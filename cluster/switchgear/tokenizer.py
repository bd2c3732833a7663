"""Text to token ids and back: a thin, typed wrapper of the `tokenizers` library. Thread-safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import tokenizers
import tokenizers.decoders

from switchgear.chat_template import ChatTemplate, special_tokens
from switchgear_runtime.errors import CheckpointError


class Tokenizer:
    """The tokenizer of one checkpoint (`tokenizer.json`), with its chat template if it has one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})  # by name: eos_token and so on
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
    def load(cls, model_dir: Path, chat_template: Path | None = None) -> Tokenizer | None:
        """None where the checkpoint has no tokenizer.json; then only token ids go in and come out.

        `chat_template`: a file to use instead of the checkpoint's own.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
            raise CheckpointError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from None
        return cls(tokenizer, ChatTemplate.load(model_dir, chat_template), special_tokens(model_dir))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """`add_special`: with the tokens that the tokenizer itself puts around a text, if it does."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token_id: int) -> str:
        """One token by itself, as logprobs name it; special tokens show."""
        return self.decode((token_id,), skip_special=False)

    def token_name(self, token_id: int) -> str:
        """As the vocabulary has it; empty for an id without a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for, exactly: a part of a character has bytes of its own but no text."""
        name = self.token_name(token_id)
        if token_id not in self.special_ids:
            if isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
                table = _byte_of_char()
                if all(char in table for char in name):
                    return bytes(table[char] for char in name)
            elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # byte fallback
                return bytes.fromhex(name[3:5])
        return self.token_text(token_id).encode()


@cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or else the next unused one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in set(printable)):
        table[chr(0x100 + i)] = byte
    return table
