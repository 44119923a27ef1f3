"""What all three domains share: the shape of a planned clip and of a question, and decks that keep answers balanced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from data_prep.synth.signals import Samples

T = TypeVar("T")


class Fact(NamedTuple):
    """A question that a clip can answer.

    Attributes:
        task: a key of `WORDINGS` in `questions.py`.
        answer: the right one.
    """

    task: str
    answer: str


@dataclass(frozen=True)
class Plan(ABC):
    """Everything that is true of one clip, decided before a sample is computed."""

    duration_s: float

    @abstractmethod
    def facts(self) -> list[Fact]:
        """Every question that this clip can answer."""

    @abstractmethod
    def render(self, rate_hz: int, rng: np.random.Generator) -> Samples:
        """The clip without background noise, (samples,); `rng` only moves details that no question asks about."""


def deck(rng: np.random.Generator, cards: Sequence[T]) -> Iterator[T]:
    """Endless shuffled rounds of `cards`: after any number of draws all cards were drawn about equally often."""
    while True:
        for index in rng.permutation(len(cards)):
            yield cards[index]
