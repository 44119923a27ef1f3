"""The forms in which texts are compared: characters that only look different, case and punctuation do not count."""

from __future__ import annotations

import re
import unicodedata

MEANINGFUL_PUNCTUATION = "#%&@"  # "C#" is not "C", "5%" is not "5"
NUMBER_MARK = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\S)[-+](?=\d)")  # of 3.5, 4:30, 3/4, -2

_APOSTROPHES = "’‘‛`´ʼʻʽʹˈ′‵՚ꞌ"
_DASHES = "‐‑‒–−"
_PLAIN = str.maketrans(
    {**dict.fromkeys(_APOSTROPHES, "'"), **dict.fromkeys(_DASHES, "-"), "⁄": "/", "♯": "#", "♭": "b"}
)
_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # 2½ is 2 1/2, not 21/2
_EXPONENT = re.compile(r"(?<=\d)(?=[⁰¹²³⁴-⁹])")  # 10² is not 102


def canonical(text: str) -> str:
    """Returns the Unicode compatibility form (NFKC) with plain apostrophes and hyphens, without invisible characters.

    Invisible are zero-width characters, soft hyphens, byte order marks and control characters.
    """
    text = _EXPONENT.sub("^", _FRACTION.sub(" ", text.translate(_PLAIN)))
    visible = "".join(character for character in text if not _is_invisible(character))
    return unicodedata.normalize("NFKC", visible).translate(_PLAIN)


def literal(text: str) -> str:
    """Returns the canonical form, case folded, with single spaces: punctuation counts."""
    return " ".join(_fold(text).split())


def normalise(text: str) -> str:
    """Returns the form in which answers are compared.

    Canonical form, case folded. Apostrophes are dropped, every other punctuation mark becomes a space, and runs of
    white space become one space. Marks that belong to a number (`3.5`, `4:30`, `-2`) or change the meaning (`C#`,
    `5%`) stay.
    """
    text = re.sub(r"(?<=\d)\s+%", "%", _fold(text))
    number_marks = {match.start() for match in NUMBER_MARK.finditer(text)}
    characters = [
        character if index in number_marks or character in MEANINGFUL_PUNCTUATION else _without_punctuation(character)
        for index, character in enumerate(text)
    ]
    return " ".join("".join(characters).split())


def words(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation; an apostrophe separates two words."""
    return re.findall(r"\w+", _fold(text))


def exact_match(prediction: str, answer: str) -> bool:
    """Returns whether both are equal after `normalise`; of texts that hold nothing but punctuation, after `literal`."""
    return (normalise(prediction) or literal(prediction)) == (normalise(answer) or literal(answer))


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", canonical(text).casefold())


def _is_invisible(character: str) -> bool:
    if character.isspace():
        return False
    # U+034F joins graphemes, U+FE00 to U+FE0F choose between glyphs of one character.
    return unicodedata.category(character) in ("Cf", "Cc") or character == "\u034f" or "\ufe00" <= character <= "\ufe0f"


def _without_punctuation(character: str) -> str:
    if character == "'":
        return ""
    return " " if unicodedata.category(character).startswith("P") else character
