"""Generates answers to many questions, in several processes: each clip is encoded once, no question is asked twice.

Owns groups of clips, processes and the journal. Does not know why a clip was chosen or how answers are scored."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from pipeline.core.errors import EXIT_FAILURE, UserError
from pipeline.core.feature_contract import read_encoders, require_same_features
from pipeline.core.streams import IntegrationKind
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.benchmark_clips import AudioClips
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.scoring import Prediction
from pipeline.inference.encode_audio import AudioEncoders
from pipeline.inference.responder import Responder, load_config_of, load_responder

AudioAssignment = Mapping[
    int, int
]  # clip whose questions are asked -> clip that is audio_of meanwhile (itself, but for a control)


@dataclass(frozen=True)
class Share:
    """The part of the work that one process does: every `count`-th piece, from `number` on."""

    number: int = 0
    count: int = 1

    def part(self, number: int, count: int) -> Share:
        """One of `count` parts of it."""
        return Share(self.number * count + number, self.count * count)


EVERYTHING = Share()


@dataclass(frozen=True)
class Job:
    """Questions to ask; all that a process needs to know.

    Attributes:
        model: exported folder; `max_new_tokens` bounds each answer.
        place, cache, weights: see `open_questions`.
        batch_size: questions at a time.
        journal: folder of the answers, one file for each process that ever worked on them.
        nproc: processes that work on it on this machine.
        fingerprint: of all that decides the answers; those to another job are not taken from the journal.
    """

    model: Path
    max_new_tokens: int
    place: str
    cache: Path | None
    weights: dict[str, str]
    audio_of: AudioAssignment
    batch_size: int
    journal: Path
    nproc: int
    fingerprint: str


Questions = FeatureSet | AudioClips  # what is asked: in a prepared set, or in a benchmark's own files


def open_questions(place: str, model: Path, cache: Path | None, weights: Mapping[str, str]) -> Questions:
    """A prepared set, or `KIND=PLACE`: a published benchmark, whose audio is encoded as the model wants it.

    Args:
        model: exported folder.
        weights: encoder -> where its weights are, for those that moved.

    Raises:
        UserError: as `FeatureSet`, `Benchmark` and `AudioEncoders`; or features of another encoder.
    """
    config, description = load_config_of(model)
    fingerprints = description.feature_fingerprints
    kind, _, folder = place.partition("=")
    if kind not in BENCHMARKS or not folder:
        features = open_set(place, list(fingerprints), cache)
        require_same_features(fingerprints, features.contract, place, str(model))
        return features
    contracts = read_encoders(model, fingerprints, config.data.train)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AudioClips(BENCHMARKS[kind](Path(folder)), lambda: AudioEncoders(contracts, weights, device))


def open_set(place: str, encoders: Sequence[str], cache: Path | None) -> FeatureSet:
    """A set in a folder, or in an object store through a cache.

    Raises:
        UserError: as `FeatureSet`.
    """
    if "://" in place and cache is None:
        raise UserError(place, "is in an object store", "give --cache a folder on a local disk")
    return FeatureSet(place, encoders, cache)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` numbers, evenly over all; None means all."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def predictions_of(features: Questions, answers: Mapping[int, str]) -> list[Prediction]:
    """Answers (by number of the question) beside the right ones, in storage order."""
    predictions = []
    for question in sorted(answers):
        clip = features.clip(int(features.table.clip[question]))
        q = clip.questions[features.table.number[question]]
        predictions.append(
            Prediction(q.question_id, clip.clip_id, clip.domain, q.task, q.question, q.answer, answers[question])
        )
    return predictions


class AnswerGenerator:
    """Asks what the journal does not answer yet. Killed at any moment and started again, it goes on from there.

    The answers do not depend on the number of processes, nor on an interruption: clips are grouped in the same way, and
    a group without all of its answers is asked again as a whole. The batch size moves the last bits alone.

    Args:
        model: exported folder, also an attribute.
        pool: processes to work in, `nproc` of them; None for this one.
        share: of all the work that these processes do; others, elsewhere, write to the same journal.
    """

    def __init__(
        self,
        model: Path,
        max_new_tokens: int,
        batch_size: int,
        journal: Path,
        pool: Executor | None,
        nproc: int,
        share: Share,
    ) -> None:
        self.model, self._max_new_tokens, self._batch_size = model, max_new_tokens, batch_size
        self._journal, self._pool, self._nproc, self._share = journal, pool, nproc, share
        self._model_fingerprint = _fingerprint_of(model)

    def __call__(
        self,
        questions: Questions,
        place: str,
        audio_of: AudioAssignment,
        cache: Path | None,
        weights: Mapping[str, str],
    ) -> dict[int, str]:
        """Number of the question -> answer, for all questions about these clips, as far as the shares are done.

        Args:
            questions: those of `place`; see `open_questions`, also for `cache` and `weights`.

        Raises:
            UserError: a damaged feature set, or a question that the model cannot take.
            BrokenProcessPool: a process was killed.
        """
        identity = questions.contract.dump() if isinstance(questions, FeatureSet) else questions.identity
        parts = [self._model_fingerprint, self._max_new_tokens, sorted(audio_of.items()), identity]
        fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        job = Job(
            self.model,
            self._max_new_tokens,
            place,
            cache,
            dict(weights),
            audio_of,
            self._batch_size,
            self._journal,
            self._nproc,
            fingerprint,
        )
        if self._pool is None:
            _work(job, self._share)
        else:
            for part in [self._pool.submit(_work, job, self._share.part(n, self._nproc)) for n in range(self._nproc)]:
                part.result()
        return read_journal(job)


@contextmanager
def open_answer_generator(
    model: Path, max_new_tokens: int, batch_size: int, journal: Path, nproc: int, share: Share = EVERYTHING
) -> Iterator[AnswerGenerator]:
    """An generator with its processes, each of which keeps its copy of the model."""
    journal.mkdir(parents=True, exist_ok=True)
    if nproc == 1:
        yield AnswerGenerator(model, max_new_tokens, batch_size, journal, None, nproc, share)
        return
    context = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not survive a fork
    with ProcessPoolExecutor(nproc, mp_context=context) as pool:
        yield AnswerGenerator(model, max_new_tokens, batch_size, journal, pool, nproc, share)


def generate_answers(
    responder: Responder,
    features: Questions,
    audio_of: AudioAssignment,
    batch_size: int,
    *,
    hidden: Collection[IntegrationKind] = (),
    share: Share = EVERYTHING,
    finished: Collection[int] = (),
) -> Iterator[dict[int, str]]:
    """Asks every question about the clips in `audio_of`, longest audio first, so that rows of a batch are alike.

    A clip is encoded once for all its questions, whatever the batch size.

    Args:
        hidden: integrations whose audio tokens the model may not see.
        finished: questions that need no answer; a group of clips is left out if all of its questions are there.

    Yields:
        number of the question -> answer, for the clips of one group.
    """
    questions: dict[int, list[int]] = {clip: [] for clip in audio_of}
    for question, clip in enumerate(features.table.clip.tolist()):
        if clip in audio_of:
            questions[clip].append(question)
    duration_s = features.table.duration_s
    order = sorted((clip for clip in audio_of if questions[clip]), key=lambda clip: (-duration_s[audio_of[clip]], clip))
    groups = _groups(order, [len(questions[clip]) for clip in order], batch_size)[share.number :: share.count]
    done = set(finished)
    left = [group for group in groups if any(not done.issuperset(questions[clip]) for clip in group)]
    count = sum(len(questions[clip]) for clip in order)
    console = Console(stderr=True, quiet=share.number > 0)
    for group in track(left, f"{count} questions", console=console):
        clips = [features.clip(clip) for clip in group]
        audio = [features.features(audio_of[clip], features.clip(audio_of[clip]).clip_id) for clip in group]
        prefix = responder.prefill(audio, hidden)
        asked = [(question, row) for row, clip in enumerate(group) for question in questions[clip]]
        answers: dict[int, str] = {}
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            texts = [clips[row].questions[features.table.number[question]].question for question, row in batch]
            replies = responder.answer(prefix, texts, [row for _, row in batch])
            answers |= {question: reply for (question, _), reply in zip(batch, replies, strict=True)}
        yield answers


def _groups(clips: Sequence[int], sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Neighbours together while their questions fit into a batch; a clip with more is a group of its own."""
    groups: list[list[int]] = []
    filled = batch_size
    for clip, size in zip(clips, sizes, strict=True):
        if filled + size > batch_size:
            groups.append([])
            filled = 0
        groups[-1].append(clip)
        filled += size
    return groups


def _work(job: Job, share: Share) -> None:
    """One process's share of a job."""
    parent = os.getppid()
    if job.nproc > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.nproc))
    responder = _responder(job.model, job.max_new_tokens, share.number)
    features = open_questions(job.place, job.model, job.cache, job.weights)
    finished = read_journal(job)
    with (job.journal / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8") as file:
        for answers in generate_answers(
            responder, features, job.audio_of, job.batch_size, share=share, finished=finished
        ):
            file.write("".join(json.dumps([job.fingerprint, *answer]) + "\n" for answer in answers.items()))
            file.flush()
            if job.nproc > 1 and os.getppid() != parent:
                os._exit(EXIT_FAILURE)  # the command that wanted these answers was killed


@lru_cache(maxsize=1)
def _responder(model: Path, max_new_tokens: int, number: int) -> Responder:
    return load_responder(model, max_new_tokens, number)


def read_journal(job: Job) -> dict[int, str]:
    """Number of the question -> answer, as far as the job is done."""
    answers = {}
    for file in sorted(job.journal.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a killed process may have left half a line
                fingerprint, question, answer = json.loads(line)
                if fingerprint == job.fingerprint:
                    answers[question] = answer
    return answers


def _fingerprint_of(folder: Path) -> str:
    """Of all files of an exported model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
