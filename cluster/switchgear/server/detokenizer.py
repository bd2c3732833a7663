"""Text from a sequence's tokens as they come: `Detokenizer`.

A character may be split over several tokens (an emoji is up to four), so the tail of what the tokens decode to is
provisional: it reads as U+FFFD until the rest arrives. We emit everything before such a tail at once, and the tail when
it is settled or at the end. Whole text = what one decode of all the tokens gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from switchgear.tokenizer import Tokenizer

NUM_CONTEXT = 8  # tokens kept when the window slides: UTF-8 finds its feet, a leading space keeps its meaning
NUM_WINDOW_MAX = 24  # decode cost of a token is bounded by this
_TAIL_MAX = 3  # a byte-fallback decoder shows up to three bytes of an unfinished character as one mark each
_MARK = "\ufffd"


class Detokenizer:
    """`append` each token, `flush` once at the end; their texts join to the output.

    Example: tokens "H", "\\xf0\\x9f", "\\x98\\x80" -> "H", "", "\\U0001f600".
    """

    def __init__(self, tokenizer: Tokenizer | None, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context_ids = context_ids[-NUM_CONTEXT:]
        self._begun = False
        self._window: list[int] = []  # tokens whose decoded text is `_num_settled` settled characters, then a tail
        self._num_settled = 0
        self._text = ""

    def append(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None or token_id in tokenizer.special_ids:
            return ""
        if not self._begun:
            self._begin(tokenizer)
        self._window.append(token_id)
        self._text = tokenizer.decode(self._window)
        settled = len(self._text) - _tail_length(self._text)
        delta = self._text[self._num_settled : settled]
        self._num_settled = max(settled, self._num_settled)
        if len(self._window) >= NUM_WINDOW_MAX:
            self._slide()
        return delta

    def flush(self) -> str:
        """The provisional tail, as it is."""
        delta = self._text[self._num_settled :]
        self._num_settled = len(self._text)
        return delta

    def _begin(self, tokenizer: Tokenizer) -> None:
        """Not before the first token: a large request admits thousands at once."""
        self._begun = True
        context = [i for i in self._context_ids if i not in tokenizer.special_ids]
        text = tokenizer.decode(context) if context else ""
        if not text.endswith(_MARK):  # a prompt that ends inside a character is no context: the output stands alone
            self._window, self._text, self._num_settled = context, text, len(text)

    def _slide(self) -> None:
        """Forget the oldest tokens. The tail is at most three bytes, so it reads the same in the shorter window."""
        assert self._tokenizer is not None
        num_held = len(self._text) - self._num_settled
        self._window = self._window[-NUM_CONTEXT:]
        self._text = self._tokenizer.decode(self._window)
        self._num_settled = max(0, len(self._text) - num_held)


def _tail_length(text: str) -> int:
    """How many characters at the end may still change."""
    tail = text[-_TAIL_MAX:]
    return len(tail) - len(tail.rstrip(_MARK))
