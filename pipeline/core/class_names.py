"""The names of classes: the text that stands for one in prompts, and the classes that an answer names.

Underscores, hyphens, slashes, spaces and case do not tell classes apart: `door_wood_knock` is `Door wood-knock`, and
`hip-hop` is `hiphop`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pipeline.core.text_forms import canonical, normalise

_SEPARATOR = re.compile(r"[,;|\n、]")  # of the names in a list; a name may hold one itself


def class_text(name: str) -> str:
    """Returns the text of a class whose published name may have underscores instead of spaces."""
    return " ".join(name.replace("_", " ").split())


def class_key(name: str) -> str:
    """Returns what is equal for all spellings of a class's name; empty for a name of punctuation alone."""
    return "".join(token for token in _tokens(name) if token != ",")


def named(prediction: str, choices: Sequence[str]) -> set[int]:
    """Returns the choices that occur in the answer, word for word; `car alarm` does not count as `car` too."""
    spellings = _spellings(tuple(choices))
    longest = max(map(len, spellings), default=0)
    tokens = _tokens(prediction)
    numbers = set()
    start = 0
    while start < len(tokens):
        text, end, number = "", start, None
        for position in range(start, len(tokens)):
            text += tokens[position]
            if len(text) > longest:
                break
            if text in spellings:
                number, end = spellings[text], position
        if number is not None:
            numbers.add(number)
        start = end + 1
    return numbers


@lru_cache
def _spellings(choices: tuple[str, ...]) -> dict[str, int]:
    """Returns spelling without spaces -> number of the first choice that has it; with and without the name's commas."""
    spellings: dict[str, int] = {}
    for number, choice in enumerate(choices):
        for spelling in ("".join(_tokens(choice)), class_key(choice)):
            if spelling:
                spellings.setdefault(spelling, number)
    return spellings


def _tokens(text: str) -> list[str]:
    """Returns the words of a text, with a comma between the parts of a list."""
    parts = [normalise(part.replace("&", " and ")).split() for part in _SEPARATOR.split(canonical(text))]
    tokens = [token for part in parts if part for token in (*part, ",")]
    return tokens[:-1]
