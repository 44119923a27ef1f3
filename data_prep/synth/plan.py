"""Defines planned clips, their facts, and shuffled decks that keep answers balanced, for all three domains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from data_prep.synth.signals import Samples

T = TypeVar("T")


class Fact(NamedTuple):
    """The answer of a clip to the question of a task.

    Attributes:
        task: a key of `WORDINGS` in `questions.py`.
        answer: the correct answer.
    """

    task: str
    answer: str


@dataclass(frozen=True)
class Plan(ABC):
    """The ground truth of one clip, drawn before any sample is rendered."""

    duration_s: float

    @abstractmethod
    def facts(self) -> list[Fact]:
        """Returns the answers of this clip, one per task that applies to it."""

    @abstractmethod
    def render(self, rate_hz: int, rng: np.random.Generator) -> Samples:
        """Returns the clip without background noise, (samples,); `rng` varies only details that no answer uses."""


def deck(rng: np.random.Generator, cards: Sequence[T]) -> Iterator[T]:
    """Yields `cards` in endless shuffled rounds, so that all cards are drawn about equally often."""
    while True:
        for index in rng.permutation(len(cards)):
            yield cards[index]
