"""Stop strings against an oracle that looks at the whole text, for every way of cutting it into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchgear.server.stop_strings import StopStrings

ALPHABET = "ab\u00e9"


def oracle(text: str, stops: list[str], *, include: bool, num_free: int = 0) -> tuple[str, str | None]:
    """Character by character: stop at the first (after `num_free`) that completes a stop string; the longest wins."""
    for end in range(num_free + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    num_free=st.integers(0, 4),
)
def test_equals_the_oracle_however_the_text_is_cut(
    pieces: list[str], stops: list[str], include: bool, num_free: int
) -> None:
    automaton = StopStrings(stops, include_in_output=include)
    emitted = ""
    text = "".join(pieces)
    expected, stop = oracle(text, stops, include=include, num_free=len("".join(pieces[:num_free])))
    for i, piece in enumerate(pieces):
        emitted += automaton.push(piece, may_stop=i >= num_free)
        assert expected.startswith(emitted)  # never a character that has to be taken back
    assert automaton.matched == stop
    assert emitted + automaton.flush() == expected


@given(text=st.text(ALPHABET, max_size=20), stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1))
def test_holds_back_no_more_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    automaton = StopStrings(stops)
    emitted = automaton.push(text)
    if automaton.matched is None:
        held = text[len(emitted) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted"),
    [
        (["END"], ["a E", "N", "D x"], ["a ", "", ""]),
        (["END"], ["a E", "N", "T x"], ["a ", "", "ENT x"]),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], emitted: list[str]) -> None:
    automaton = StopStrings(stops)
    assert [automaton.push(piece) for piece in pieces] == emitted
