"""Evaluates a generator on one benchmark: its answers, its scores, and the controls beside them.

Does not know how answers are generated or where results are written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.core.console import logger
from pipeline.core.errors import UserError
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.baselines import majority_baseline, swap_audio
from pipeline.evaluation.benchmark_clips import BenchmarkClips
from pipeline.evaluation.benchmarks import Benchmark
from pipeline.evaluation.generate_answers import AnswerGenerator
from pipeline.evaluation.intervals import bootstrap_ci95
from pipeline.evaluation.question_sets import (
    QuestionSet,
    QuestionSource,
    clips_with_questions,
    conversation_clips,
    make_predictions,
    open_feature_set,
    open_question_set,
)
from pipeline.evaluation.scoring import Prediction, score
from pipeline.evaluation.word_errors import add_word_errors

OWN_AUDIO, SWAPPED_AUDIO = "own", "swapped"  # values of `audio` in the predictions


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated beside the answers to the clips' own audio.

    Attributes:
        limit: number of clips, evenly spaced over the set; None means all.
        swap_audio: also answer with another clip's audio.
        majority_from: training set whose majority baseline is scored as well.
        writes_predictions: whether the caller writes the predictions to a file, not the scores alone.
        transcription_tasks: tasks whose answers are transcripts, beside those whose names say so.
    """

    limit: int | None = None
    swap_audio: bool = False
    majority_from: str | None = None
    writes_predictions: bool = True
    transcription_tasks: Sequence[str] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one benchmark.

    Attributes:
        scores: the scores of `scoring.score`, those of the controls under `swapped_audio` and `majority_baseline`, and
            the metrics of a published benchmark. Transcriptions have word error rates (`word_errors`). Questions whose
            answers the publishers withhold are counted as `unscored`; where all are withheld there are no scores.
            `truncated_answers` counts the answers that ended at the bound on new tokens, `decoding` holds the settings
            of decoding.
        predictions: predictions as plain JSON, in storage order, each with `decoding`.
        official_files: name -> text of the files that official scorers read.
    """

    scores: dict[str, Any]
    predictions: list[dict[str, Any]]
    official_files: dict[str, str] = field(default_factory=dict)


def evaluate_benchmark(
    generator: AnswerGenerator, source: QuestionSource, options: EvaluationOptions | None = None
) -> BenchmarkResult:
    """Answers and scores all questions of a benchmark, with the controls of `options`.

    Raises:
        UserError: no such benchmark, features of another encoder, audio that cannot be read, a swap with one clip, or
            withheld answers where answers are needed.
    """
    options = options or EvaluationOptions()
    question_set = open_question_set(source, generator.settings.model)
    clips = clips_with_questions(question_set, options.limit)
    benchmark = question_set.benchmark if isinstance(question_set, BenchmarkClips) else None
    if benchmark is not None:
        _check_benchmark(benchmark, source, options)

    tasks = _transcription_tasks(question_set, source, options)

    def predict(pairing: Mapping[int, int]) -> list[Prediction]:
        predictions = make_predictions(question_set, generator.generate(question_set, source, clips, pairing))
        _warn_of_truncated(source.location, predictions, generator)
        return predictions if benchmark is None else apply_benchmark_rules(predictions, benchmark)

    swapped_pairing = None
    if _can_swap(question_set, source, options):
        swapped_pairing = swap_audio(question_set, conversation_clips(question_set, clips))
    predictions = predict({clip: clip for clip in clips})
    scores = _score_generated(predictions, tasks) | {"decoding": generator.decoding}
    official_files: dict[str, str] = {}
    if benchmark is not None:
        scores |= _benchmark_metrics(benchmark, predictions)
        official = benchmark.predictions_file({p.question_id: p.prediction for p in predictions})
        official_files = {} if official is None else dict([official])
    decoding = {"decoding": generator.decoding}
    lines = [{"audio": OWN_AUDIO, **prediction.to_json(), **decoding} for prediction in predictions]
    if swapped_pairing is not None:
        swapped = predict(swapped_pairing)
        scores["swapped_audio"] = _score_generated(swapped, tasks)
        lines += [{"audio": SWAPPED_AUDIO, **prediction.to_json(), **decoding} for prediction in swapped]
    if options.majority_from is not None:
        baseline = majority_baseline(open_feature_set(options.majority_from, [], source.cache))
        guesses = [replace(p, prediction=baseline.predict(p.task, p.question)) for p in predictions]
        if benchmark is not None:
            guesses = apply_benchmark_rules(guesses, benchmark)
        scores["majority_baseline"] = _score_answered(guesses, tasks)
    return BenchmarkResult(scores, lines, official_files)


def answer_partition(generator: AnswerGenerator, source: QuestionSource, options: EvaluationOptions) -> None:
    """Answers the generator's partition of the questions of `evaluate_benchmark`; leaves the answers in the journal.

    Raises:
        UserError: as `evaluate_benchmark`.
    """
    question_set = open_question_set(source, generator.settings.model)
    clips = clips_with_questions(question_set, options.limit)
    generator.generate(question_set, source, clips, {clip: clip for clip in clips})
    if _can_swap(question_set, source, options):
        pairing = swap_audio(question_set, conversation_clips(question_set, clips))
        generator.generate(question_set, source, clips, pairing)


def _can_swap(question_set: QuestionSet, source: QuestionSource, options: EvaluationOptions) -> bool:
    """Returns whether the control with swapped audio is requested and possible; logs it where it is not."""
    is_text = isinstance(question_set, FeatureSet) and question_set.is_text
    if options.swap_audio and is_text:
        logger.warning(f"{source.location}: a set of text has no audio to swap, so it has no such control")
    return options.swap_audio and not is_text


def apply_benchmark_rules(predictions: Sequence[Prediction], benchmark: Benchmark) -> list[Prediction]:
    """Returns the predictions with correctness by the benchmark's own rules."""
    items = {item.question_id: item for item in benchmark.items}
    return [replace(p, benchmark_correct=benchmark.is_correct(items[p.question_id], p.prediction)) for p in predictions]


def _check_benchmark(benchmark: Benchmark, source: QuestionSource, options: EvaluationOptions) -> None:
    """Logs the benchmark's caveat; refuses scores and controls where the publishers withhold all answers."""
    if benchmark.caveat:
        logger.info(f"{benchmark.name}: {benchmark.caveat}")
    if any(item.answer for item in benchmark.items):
        return
    if not options.writes_predictions:
        remedy = "give --predictions FILE; the file for their server is written beside it"
        raise UserError(source.location, "cannot be scored: its publishers withhold the answers", remedy)
    if options.swap_audio or options.majority_from:
        fault = "cannot be scored, so controls cannot either: its publishers withhold the answers"
        raise UserError(source.location, fault, "leave --swap-audio and --majority-from out")


def _benchmark_metrics(benchmark: Benchmark, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Returns the metrics of a published benchmark over the questions that have an answer; empty without any."""
    answered = {p.question_id: p.prediction for p in predictions if p.answer}
    if not answered:
        return {}
    metrics: dict[str, Any] = dict(benchmark.extra_metrics(answered))
    clip_of = {p.question_id: p.clip_id for p in predictions}
    for metric, question_scores in benchmark.question_scores(answered).items():
        values = np.array(list(question_scores.values()))
        metrics[metric] = float(values.mean())
        metrics[f"{metric}_ci95"] = list(bootstrap_ci95(values, [clip_of[question] for question in question_scores]))
    return metrics


def _warn_of_truncated(name: str, predictions: Sequence[Prediction], generator: AnswerGenerator) -> None:
    if count := sum(prediction.truncated for prediction in predictions):
        bound = generator.settings.max_new_tokens
        logger.warning(
            f"{name}: {count} of {len(predictions)} answers are truncated at {bound} tokens; raise --max-new-tokens"
        )


def _transcription_tasks(question_set: QuestionSet, source: QuestionSource, options: EvaluationOptions) -> set[str]:
    """Returns the tasks that are transcriptions whatever their names; warns of those that the set lacks."""
    if isinstance(question_set, BenchmarkClips):
        known = {item.task for item in question_set.benchmark.items}
        if question_set.benchmark.has_transcripts:
            return known
    else:
        known = set(question_set.table.tasks)
    if absent := sorted(set(options.transcription_tasks) - known):
        tasks = ", ".join(sorted(known))
        logger.warning(f"{source.location}: --wer names {', '.join(absent)}, but the set has the tasks {tasks}")
    return set(options.transcription_tasks)


def _score_generated(predictions: Sequence[Prediction], tasks: Collection[str]) -> dict[str, Any]:
    """Scores generated answers, and counts those that were truncated."""
    truncated = sum(prediction.truncated for prediction in predictions)
    return _score_answered(predictions, tasks) | {"truncated_answers": truncated}


def _score_answered(predictions: Sequence[Prediction], tasks: Collection[str]) -> dict[str, Any]:
    """Scores the questions that have a reference answer; counts the others."""
    answered = [prediction for prediction in predictions if prediction.answer]
    unscored = len(predictions) - len(answered)
    if not answered:
        return {"unscored": unscored, "clips": len({prediction.clip_id for prediction in predictions})}
    scores = score(answered) | ({"unscored": unscored} if unscored else {})
    add_word_errors(scores, answered, tasks)
    return scores
