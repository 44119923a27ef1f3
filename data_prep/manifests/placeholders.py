"""Finds what stands for a sound in the texts of other tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.manifests.unsupported import Unsupported

# Placeholders of ms-swift, LLaMA-Factory, Qwen (2 and 3), Audio Flamingo, SALMONN and Phi.
PLACEHOLDER = re.compile(
    r"<\|audio_(?:bos|start)\|>\s*<\|audio(?:_pad)?\|>\s*<\|audio_(?:eos|end)\|>"
    r"|<(?P<tag>audio|speech)>\s*<(?P=tag)here>\s*</(?P=tag)>"
    r"|<\|(?:audio|sound|speech)(?:_pad|_(?P<number>\d+))?\|>"
    r"|<(?:audio|sound|speech)(?:[-_]?(?P<other_number>\d+)|here)?>",
    re.IGNORECASE,
)
_OTHER_MEDIA = re.compile(r"<\|?(?:image|video)(?:_pad|_\d+)?\|?>", re.IGNORECASE)


@dataclass(frozen=True)
class Slot:
    """The place of a sound in a text.

    Attributes:
        number: number that the placeholder carries (`<|audio_2|>`); None means the next sound of the row.
    """

    number: int | None = None


def split_text(text: str) -> Iterator[str | Slot]:
    """Yields the texts and the placeholders of a text in order.

    Raises:
        Unsupported: the text has a placeholder of an image or a video.
    """
    if match := _OTHER_MEDIA.search(text):
        raise Unsupported(f"has the placeholder {match.group()} of an image or a video")
    position = 0
    for match in PLACEHOLDER.finditer(text):
        if match.start() > position:
            yield text[position : match.start()]
        number = match["number"] or match["other_number"]
        yield Slot(None if number is None else int(number))
        position = match.end()
    if position < len(text):
        yield text[position:]


def sounds_of_slots(slots: Sequence[Slot], sounds: int) -> list[int]:
    """Returns the index of each slot's sound; there are as many slots as sounds.

    Raises:
        Unsupported: some slots carry numbers and others do not, or the numbers are not those of the sounds.
    """
    numbers = [slot.number for slot in slots if slot.number is not None]
    if not numbers:
        return list(range(sounds))
    first = min(numbers)
    if len(numbers) < len(slots) or first > 1 or sorted(numbers) != list(range(first, first + sounds)):
        named = ", ".join(str(slot.number) for slot in slots)
        raise Unsupported(f"numbers its {sounds} sounds {named}, not each once from 1")
    return [number - first for number in numbers]


def tidy(content: Sequence[str | int]) -> list[str | int]:
    """Returns the content of a user turn with adjacent texts joined, and without white space at its ends.

    What separates a sound at its beginning from the text is left out too: the chat template has its own separation.
    Every other character keeps its place.
    """
    joined: list[str | int] = []
    for part in content:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    for position, part in enumerate(joined):
        if isinstance(part, str):
            joined[position] = part.lstrip()
            if joined[position]:
                break
    return [part for part in joined if part != ""]


def text_of(content: Sequence[str | int]) -> str:
    """Returns the text of a user turn, with `<audio>` for its sounds except those in front of all text."""
    first = next((position for position, part in enumerate(content) if isinstance(part, str)), len(content))
    return "".join(part if isinstance(part, str) else "<audio>" for part in content[first:]).strip()
