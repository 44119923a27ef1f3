"""Prefills the prompts of questions: questions that begin alike about the same audio share a row of a prefix cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.feature_contract import Question
from pipeline.core.streams import IntegrationKind
from pipeline.evaluation.question_sets import ClipNumbers, QuestionSet, features_of
from pipeline.inference.responder import Responder
from pipeline.model import PrefixCache


@dataclass(frozen=True)
class PromptRows:
    """Distinct beginnings of prompts, with the questions that continue them.

    Attributes:
        prefixes: for each row its token ids and the clip at each placeholder.
        questions: index of the question, its row, and the question.
    """

    prefixes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    questions: list[tuple[int, int, Question]] = field(default_factory=list)

    def prefill(
        self, responder: Responder, question_set: QuestionSet, hidden: Collection[IntegrationKind]
    ) -> PrefixCache:
        """Prefills all rows; each clip is encoded once, in however many of them it occurs."""
        number = {clip: n for n, clip in enumerate(dict.fromkeys(c for _, clips in self.prefixes for c in clips))}
        features = features_of(question_set, number)
        placeholders = [number[clip] for _, clips in self.prefixes for clip in clips]
        return responder.prefill_prompts([ids for ids, _ in self.prefixes], features, placeholders, hidden)


def prompt_rows(
    responder: Responder,
    question_set: QuestionSet,
    clip_numbers: ClipNumbers,
    questions: Sequence[int],
    audio: Mapping[int, int] | None,
    max_rows: int,
) -> Iterator[PromptRows]:
    """Yields the prompts of questions, at most `max_rows` distinct beginnings at a time.

    Args:
        clip_numbers: clips of the set by their ids.
        questions: indices of the questions.
        audio: clip -> the clip whose audio replaces its own; None leaves all audio out of the prompts.

    Raises:
        UserError: a question that the model cannot take, or that names a clip which is not in the set.
    """
    rows = PromptRows()
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for index in questions:
        own = int(question_set.table.clip[index])
        question = question_set.clip(own).questions[question_set.table.number[index]]
        prompt = responder.prompt_of(question, has_audio=audio is not None and not question_set.is_text)
        clips = clip_numbers.of_question(own, question)
        named_clips = [clips[number] for number in prompt.clips]
        prefix = tuple(prompt.prefix), tuple((audio or {}).get(clip, clip) for clip in named_clips)
        if prefix not in numbers:
            if len(numbers) == max_rows:
                yield rows
                rows, numbers = PromptRows(), {}
            numbers[prefix] = len(numbers)
            rows.prefixes.append(prefix)
        rows.questions.append((index, numbers[prefix], question))
    if rows.questions:
        yield rows
