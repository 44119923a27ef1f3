"""Opens question sets: a prepared feature set, or a published benchmark with its own audio files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question, read_encoders, require_same_features, require_text
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.benchmark_clips import BenchmarkClips
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.scoring import Prediction
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import Reply, load_config_of

QuestionSet = FeatureSet | BenchmarkClips


@dataclass(frozen=True)
class QuestionSource:
    """Where a question set comes from.

    Attributes:
        location: folder or URL of a prepared feature set, or `KIND=FOLDER` for a published benchmark.
        cache: folder for local copies of a remote feature set.
        encoder_weights: encoder -> location of its weights, for those that are not where they were in preparation.
    """

    location: str
    cache: Path | None = None
    encoder_weights: Mapping[str, str] = field(default_factory=dict)


def open_question_set(source: QuestionSource, model: Path) -> QuestionSet:
    """Opens a feature set, or a published benchmark whose audio is encoded as the model needs it.

    Args:
        model: exported folder.

    Raises:
        UserError: as `FeatureSet`, `Benchmark` and `AudioEncoders`; or features of another encoder.
    """
    config, description = load_config_of(model)
    fingerprints = description.feature_fingerprints
    kind, _, folder = source.location.partition("=")
    if kind not in BENCHMARKS or not folder:
        return _open_prepared(source, fingerprints, model)
    if config.model.text_only:
        raise UserError(model, f"was trained on text alone, and {kind} asks about audio", "evaluate a set of text")
    contracts = read_encoders(model, fingerprints, config.data.train)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark = BENCHMARKS[kind](Path(folder))
    return BenchmarkClips(benchmark, lambda: AudioEncoders(contracts, source.encoder_weights, device))


def _open_prepared(source: QuestionSource, fingerprints: dict[str, str], model: Path) -> FeatureSet:
    """Opens a feature set, or a set of text, which every model can answer."""
    features = open_feature_set(source.location, [], source.cache)
    if features.is_text:
        return features
    if not fingerprints:
        require_text(features.contract, source.location)
    features = open_feature_set(source.location, list(fingerprints), source.cache)
    require_same_features(fingerprints, features.contract, source.location, str(model))
    return features


def open_feature_set(location: str, encoders: Sequence[str], cache: Path | None) -> FeatureSet:
    """Opens a feature set in a folder, or in an object store through a cache.

    Raises:
        UserError: as `FeatureSet`.
    """
    if "://" in location and cache is None:
        raise UserError(location, "is in an object store", "give --cache a folder on a local disk")
    return FeatureSet(location, encoders, cache)


class ClipNumbers:
    """Finds the clips that conversations name; reads the ids of a set when the first one is looked up."""

    def __init__(self, question_set: QuestionSet) -> None:
        self._question_set = question_set
        self._numbers: dict[str, int] = {}

    def of_question(self, own: int, question: Question) -> tuple[int, ...]:
        """Returns the index of a question's own clip and those of `Question.clips`.

        Raises:
            UserError: a clip is not in the set.
        """
        if not question.clips:
            return (own,)
        if not self._numbers:
            ids = (self._question_set.clip(index).clip_id for index in range(len(self._question_set)))
            self._numbers = {clip_id: index for index, clip_id in enumerate(ids)}
        for clip_id in question.clips:
            if clip_id not in self._numbers:
                fault = f"names the clip '{clip_id}', which is not in its feature set"
                raise UserError(f"question '{question.question_id}'", fault, "prepare the set again")
        return own, *(self._numbers[clip_id] for clip_id in question.clips)


def features_of(question_set: QuestionSet, clips: Iterable[int]) -> list[dict[str, NDArray[np.float16]]]:
    """Returns the features of clips, as of `FeatureSet.features`."""
    return [question_set.features(clip, question_set.clip(clip).clip_id) for clip in clips]


def conversation_clips(question_set: QuestionSet, clips: Sequence[int]) -> list[int]:
    """Returns these clips, and then the other clips that the conversations about them name."""
    numbers = ClipNumbers(question_set)
    named = (
        number for clip in clips for q in question_set.clip(clip).questions for number in numbers.of_question(clip, q)
    )
    return list(dict.fromkeys([*clips, *named]))


def clips_with_questions(question_set: QuestionSet, limit: int | None) -> list[int]:
    """Returns the clips that have questions, or `limit` of them at even distances."""
    clips = np.unique(question_set.table.clip).tolist()
    return [clips[index] for index in evenly_spaced(len(clips), limit)]


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Returns `limit` of the indices 0 to `count` - 1 at even distances; None means all of them."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def make_predictions(question_set: QuestionSet, answers: Mapping[int, Reply]) -> list[Prediction]:
    """Returns generated answers (by index of the question) with their reference answers, in storage order."""
    predictions = []
    for index in sorted(answers):
        clip = question_set.clip(int(question_set.table.clip[index]))
        question = clip.questions[question_set.table.number[index]]
        predictions.append(
            Prediction(
                question_id=question.question_id,
                clip_id=clip.clip_id,
                domain=clip.domain_of(question),
                task=question.task,
                question=question.question,
                answer=question.answer,
                prediction=answers[index].text,
                truncated=answers[index].truncated,
                choice_question=question if question.choices else None,
            )
        )
    return predictions
