"""Conversations as text for people: places of audio, tokens with loss, and characters that a terminal does not show."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_JOINERS = "\u200c\u200d"  # they shape scripts and emoji
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories
_BOLD, _DIM, _GREEN, _CYAN = "1", "2", "32", "36"
_LABEL_WIDTH = 10


@dataclass(frozen=True)
class Part:
    """A piece of a conversation.

    Attributes:
        text: its characters; of audio, what stands at its place.
        audio: whether this is the place of a clip.
        loss: whether its tokens carry loss.
    """

    text: str
    audio: bool = False
    loss: bool = False


@dataclass(frozen=True)
class Style:
    """How a conversation is marked: in colours, or in brackets.

    Attributes:
        color: whether the output is a terminal that shows colours.
    """

    color: bool

    @property
    def legend(self) -> str:
        """How tokens with loss look."""
        return self._paint("green", _GREEN) if self.color else "⟦in these brackets⟧"

    def heading(self, text: str) -> str:
        """Returns the first line of a block."""
        return self._paint(visible(text), _BOLD)

    def label(self, text: str) -> str:
        """Returns a label, padded to the width of all labels."""
        return self._paint(text.ljust(_LABEL_WIDTH), _DIM)

    def conversation(self, parts: Sequence[Part]) -> str:
        """Returns the text of a conversation with its marks."""
        text = ""
        for part in parts:
            if part.audio:
                text += self._paint(f"⟨{part.text}⟩", _CYAN)
            elif part.loss:
                text += self._paint(visible(part.text), _GREEN) if self.color else f"⟦{visible(part.text)}⟧"
            else:
                text += visible(part.text)
        return text

    def _paint(self, text: str, code: str) -> str:
        # Line by line: pagers reset colours at the end of a line.
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if self.color else text


def stdout_style() -> Style:
    """Returns colours on a terminal, unless NO_COLOR (https://no-color.org) is set; brackets everywhere else."""
    return Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def visible(text: str) -> str:
    """Returns the text with signs for the characters that a terminal obeys or hides; line breaks are kept."""
    return "".join(
        character
        if character == "\n" or character in _JOINERS or unicodedata.category(character) not in _HIDDEN
        else _sign(character)
        for character in text
    )


def _sign(character: str) -> str:
    """Returns `␉` for a tab and its like, and `⟨U+202E⟩` for characters without a sign of their own."""
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def field_lines(label: str, text: str, style: Style, indent: int = 2) -> str:
    """Returns a label and a text, whose further lines are aligned below its first."""
    first, *others = text.split("\n")
    lines = [f"{' ' * indent}{style.label(label)}{first}"]
    lines += [f"{' ' * (indent + _LABEL_WIDTH)}{line}".rstrip() for line in others]
    return "\n".join(lines)
