"""Readers without a model: `pal evaluate` with answers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline.core.feature_contract import Question
from pipeline.evaluation import generate_answers
from pipeline.evaluation.generate_answers import GenerationSettings
from pipeline.evaluation.question_sets import QuestionSet, QuestionSource
from pipeline.inference.responder import Reply


@dataclass(frozen=True)
class Reader:
    """Answers as a test chooses, in place of `AnswerGenerator`."""

    settings: GenerationSettings
    answer: Callable[[Question], str]
    decoding: Mapping[str, Any]

    def generate(self, question_set: QuestionSet, source: QuestionSource, clips: Any, pairing: Any) -> dict[int, Reply]:
        table, replies = question_set.table, {}
        for index in range(len(table)):
            if (clip := int(table.clip[index])) in clips:
                question = question_set.clip(clip).questions[table.number[index]]
                replies[index] = Reply(self.answer(question), truncated=False)
        return replies


def use_reader(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Question], str]) -> None:
    """Lets `pal evaluate` take its answers from a function, and everything else from the code that it always runs."""

    @contextmanager
    def open_reader(settings: GenerationSettings) -> Iterator[Reader]:
        settings.journal.mkdir(parents=True, exist_ok=True)
        yield Reader(settings, answer, {})

    monkeypatch.setattr(generate_answers, "open_answer_generator", open_reader)
