"""Finds the questions of a selection that cannot be trained on, before anything is trained: `pal train` leaves them out
or refuses to start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.feature_set import FeatureSet
from pipeline.data.length_errors import too_many_positions, too_many_text_tokens
from pipeline.data.question_check_cache import load_or_measure
from pipeline.data.question_check_measure import Measurements

AudioPositions = Callable[[float], int]  # seconds of a clip -> approximate positions of its audio
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Questions that a run selects.

    Attributes:
        key: config key that names the set, for messages.
        tasks, datasets: tasks and datasets whose questions are selected; None selects all.
    """

    key: str
    tasks: Sequence[str] | None
    datasets: Sequence[str] | None

    @property
    def section(self) -> str:
        """Config key of `tasks` and `datasets`."""
        return self.key if self.key.startswith("data.mixture") else "data"


@dataclass(frozen=True)
class UnfitQuestion:
    """A selected question that cannot be trained on.

    Attributes:
        source: config key of its set.
        reason: `text`, `choices`, `text_tokens` or `positions`.
        fault, remedy: what is wrong with it, and what the user can do about it.
    """

    source: str
    question_id: str
    clip_id: str
    reason: str
    fault: str
    remedy: str


@dataclass(frozen=True)
class CheckedSelection:
    """What the check of a selection found.

    Attributes:
        selection: what was checked.
        count: number of its questions.
        unfit: those that cannot be trained on, in storage order.
    """

    selection: Selection
    count: int
    unfit: Sequence[UnfitQuestion]

    def report(self) -> str:
        """Returns one line that counts the unfit questions, of which there is at least one, and describes the first."""
        first = self.unfit[0]
        verb = "is" if len(self.unfit) == 1 else "are"
        return (
            f"{self.selection.key}: {len(self.unfit):,} of {self.count:,} questions {verb} left out: "
            f"question '{first.question_id}' {first.fault}; {first.remedy}"
        )


class QuestionChecker:
    """Checks the questions of feature sets against the chat template, the tokenizer and the bounds of a run.

    A question is unfit if the template or the tokenizer cannot express its texts, if an answer is empty or none of its
    choices, if it is longer than `data.max_text_tokens`, or if it takes more positions with its audio than the language
    model has.

    Args:
        chat_template: renders the conversations.
        data: bounds, and what happens to unfit questions.
        max_positions: positions of the language model; None means no limit.
        audio_positions: how many positions the audio of a clip takes, which grows with its length.
    """

    def __init__(
        self,
        chat_template: ChatTemplate,
        data: DataConfig,
        max_positions: int | None,
        audio_positions: AudioPositions,
    ) -> None:
        self._chat_template, self._data, self._max_positions = chat_template, data, max_positions
        self._audio_positions = lru_cache(maxsize=None)(audio_positions)

    def check(self, feature_set: FeatureSet, selection: Selection) -> CheckedSelection:
        """Finds the unfit questions of a selection, which the set's `table.select` leaves out from now on.

        The number of text tokens of each question is in `table.tokens` afterwards.

        Raises:
            UserError: too many questions are unfit, or one is and `data.unfit_questions` is `error`.
        """
        measured = load_or_measure(feature_set, self._chat_template)
        table = replace(feature_set.table, tokens=None, prefix_tokens=None, fits=None)
        selected = table.select(selection.tasks, selection.datasets, selection.section)
        positions = self._positions(feature_set, measured)
        too_long = measured.text_tokens > self._data.max_text_tokens
        too_far = np.zeros(len(table), bool)
        if self._max_positions is not None:
            too_far = positions > self._max_positions
        fits = ~(too_long | too_far)
        fits[list(measured.faults)] = False
        feature_set.table = replace(
            table, tokens=measured.suffix_tokens, prefix_tokens=measured.prefix_tokens, fits=fits
        )
        unfit = [
            self._describe(feature_set, selection, measured, positions, int(index))
            for index in selected[~fits[selected]]
        ]
        if unfit:
            self._refuse(unfit, len(selected))
        return CheckedSelection(selection, len(selected), unfit)

    def _positions(self, feature_set: FeatureSet, measured: Measurements) -> Ints:
        """Returns how many positions each question takes with its audio; of those that surely fit, a lower bound."""
        table = feature_set.table
        placeholders = np.ones(len(table), np.int64)  # that of a question about no clip is dropped later
        for index, clips in table.audio.items():
            placeholders[index] = max(1, len(clips))
        positions = measured.text_tokens - placeholders
        if self._max_positions is None or feature_set.is_text or not len(table.duration_s):
            return positions
        longest = self._audio_positions(float(table.duration_s.max()))
        may_be_too_long = positions + longest > self._max_positions
        may_be_too_long[list(table.audio)] = True
        for index in map(int, np.flatnonzero(may_be_too_long)):
            clips = table.audio.get(index, (int(table.clip[index]),))
            positions[index] += sum(self._audio_positions(float(table.duration_s[clip])) for clip in clips)
        return positions

    def _describe(
        self, feature_set: FeatureSet, selection: Selection, measured: Measurements, positions: Ints, index: int
    ) -> UnfitQuestion:
        """Returns what is wrong with the question at an index."""
        table = feature_set.table
        clip = feature_set.clip(int(table.clip[index]))
        question_id = clip.questions[table.number[index]].question_id
        where = f"question '{question_id}'"
        if index in measured.faults:
            reason, fault, remedy = measured.faults[index]
            return UnfitQuestion(selection.key, question_id, clip.clip_id, reason, fault, remedy)
        if self._max_positions is not None and positions[index] > self._max_positions:
            error, reason = too_many_positions(where, int(positions[index]), self._max_positions), "positions"
        else:
            tokens, limit = int(measured.text_tokens[index]), self._data.max_text_tokens
            error, reason = too_many_text_tokens(where, tokens, limit), "text_tokens"
        return UnfitQuestion(selection.key, question_id, clip.clip_id, reason, error.fault, error.remedy)

    def _refuse(self, unfit: Sequence[UnfitQuestion], count: int) -> None:
        """Raises the error about these unfit questions of `count`, unless they may be left out."""
        (reason, _), *_ = reasons = Counter(question.reason for question in unfit).most_common()
        first = next(question for question in unfit if question.reason == reason)
        example = f"question '{first.question_id}' {first.fault}"
        if self._data.unfit_questions == "error":
            others = f" ({len(unfit) - 1:,} more of {count:,} questions are unfit)" if len(unfit) > 1 else ""
            remedy = f"{first.remedy}; data.unfit_questions=skip leaves out every such question"
            raise UserError(first.source, f"{example}{others}", remedy)
        if len(unfit) > self._data.max_unfit_fraction * count or len(unfit) == count:
            counts = ", ".join(f"{number:,} for {name}" for name, number in reasons)
            fault = f"{len(unfit):,} of {count:,} questions are unfit ({counts}; for example {example})"
            if len(unfit) == count:
                raise UserError(first.source, f"{fault}, so nothing is left", first.remedy)
            fault += f", more than data.max_unfit_fraction {self._data.max_unfit_fraction:g}"
            raise UserError(first.source, fault, f"{first.remedy}; or raise data.max_unfit_fraction to go without them")
