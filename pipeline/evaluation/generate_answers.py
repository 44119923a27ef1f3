"""Generates answers to many questions in several processes: encodes each clip once for all its questions, and skips
questions whose answers the journal holds.

Owns groups of clips and processes. Does not know why a clip was chosen or how answers are scored."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.core.console import configure_logging, progress
from pipeline.core.errors import EXIT_FAILURE
from pipeline.core.streams import IntegrationKind
from pipeline.data.feature_set import FeatureSet
from pipeline.data.question_table import QuestionTable
from pipeline.evaluation.answer_journal import AnswerJournal, fingerprint_job, fingerprint_model
from pipeline.evaluation.question_sets import QuestionSet, QuestionSource, open_question_set
from pipeline.inference.responder import Features, Reply, Responder, greedy_decoding, load_responder, log_decoding

AudioPairing = Mapping[int, int]  # clip of the questions -> clip of the audio: the same one, except in a control


@dataclass(frozen=True)
class Partition:
    """One of `count` parts of the work: every `count`-th group of clips, starting with group `index`."""

    index: int = 0
    count: int = 1

    def split(self, index: int, count: int) -> Partition:
        """Returns one of `count` parts of this part."""
        return Partition(self.index * count + index, self.count * count)

    def select(self, groups: Sequence[ClipGroup]) -> Sequence[ClipGroup]:
        """Returns the groups of this part."""
        return groups[self.index :: self.count]


@dataclass(frozen=True)
class ClipGroup:
    """Clips that are encoded together.

    Attributes:
        clips: (clip of the questions, clip of the audio) pairs.
        questions: (index of the question, position of its clip in `clips`) pairs.
    """

    clips: Sequence[tuple[int, int]]
    questions: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class GenerationSettings:
    """How, where and by how many processes answers are generated.

    Attributes:
        model: exported folder.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per batch.
        journal: folder of the answers, see `AnswerJournal`; other machines may write to the same one.
        nproc: processes on this machine.
        partition: part of the work that is done on this machine.
    """

    model: Path
    max_new_tokens: int
    batch_size: int
    journal: Path
    nproc: int = 1
    partition: Partition = Partition()


@dataclass(frozen=True)
class Job:
    """The questions of one benchmark, as a worker process receives them."""

    settings: GenerationSettings
    source: QuestionSource
    pairing: AudioPairing
    fingerprint: str

    @property
    def journal(self) -> AnswerJournal:
        """The journal of this job's answers."""
        return AnswerJournal(self.settings.journal, self.fingerprint)


class AnswerGenerator:
    """Generates the answers that the journal does not hold yet, so an interrupted evaluation resumes where it stopped.

    The answers depend neither on the number of processes nor on an interruption: clips are always grouped in the same
    way, and a group with a missing answer is generated again as a whole. The batch size changes no more than the last
    bits of the logits.

    Args:
        settings: also an attribute.
        pool: `settings.nproc` worker processes; None to work in this process.
    """

    def __init__(self, settings: GenerationSettings, pool: Executor | None) -> None:
        self.settings, self._pool = settings, pool
        self._model_fingerprint = fingerprint_model(settings.model)
        log_decoding(settings.max_new_tokens)

    @property
    def decoding(self) -> dict[str, Any]:
        """Settings of decoding, as plain JSON."""
        return greedy_decoding(self.settings.max_new_tokens)

    def generate(self, question_set: QuestionSet, source: QuestionSource, pairing: AudioPairing) -> dict[int, Reply]:
        """Returns index of the question -> answer for those questions about the clips of `pairing` that the journal
        now answers: all of them, unless other machines still work on their partitions.

        Args:
            question_set: the question set of `source`.

        Raises:
            UserError: a damaged feature set, or a question that the model cannot take.
            BrokenProcessPool: a process was killed.
        """
        identity = question_set.contract.dump() if isinstance(question_set, FeatureSet) else question_set.identity
        fingerprint = fingerprint_job(self._model_fingerprint, self.decoding, pairing, identity)
        job = Job(self.settings, source, pairing, fingerprint)
        partition, nproc = self.settings.partition, self.settings.nproc
        if self._pool is None:
            _run_job(job, partition)
        else:
            for future in [self._pool.submit(_run_job, job, partition.split(n, nproc)) for n in range(nproc)]:
                future.result()
        return job.journal.read()


@contextmanager
def open_answer_generator(settings: GenerationSettings) -> Iterator[AnswerGenerator]:
    """Starts a generator and its processes, each of which keeps its own copy of the model."""
    settings.journal.mkdir(parents=True, exist_ok=True)
    if settings.nproc == 1:
        yield AnswerGenerator(settings, None)
        return
    context = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not survive a fork
    with ProcessPoolExecutor(settings.nproc, mp_context=context, initializer=configure_logging) as pool:
        yield AnswerGenerator(settings, pool)


def group_clips(table: QuestionTable, pairing: AudioPairing, batch_size: int) -> list[ClipGroup]:
    """Groups clips whose questions fit into one batch together; a clip with more questions is a group of its own.

    Clips with the longest audio come first, so that the clips of a group have similar lengths.
    """
    questions: dict[int, list[int]] = {clip: [] for clip in pairing}
    for index, clip in enumerate(table.clip.tolist()):
        if clip in pairing:
            questions[clip].append(index)
    order = sorted((clip for clip in pairing if questions[clip]), key=lambda c: (-table.duration_s[pairing[c]], c))
    groups: list[list[int]] = []
    filled = batch_size
    for clip in order:
        if filled + len(questions[clip]) > batch_size:
            groups.append([])
            filled = 0
        groups[-1].append(clip)
        filled += len(questions[clip])
    return [
        ClipGroup(
            [(clip, pairing[clip]) for clip in group],
            [(index, row) for row, clip in enumerate(group) for index in questions[clip]],
        )
        for group in groups
    ]


def unanswered_groups(groups: Sequence[ClipGroup], answered: Collection[int]) -> list[ClipGroup]:
    """Returns the groups with at least one question that is not answered."""
    done = set(answered)
    return [group for group in groups if any(index not in done for index, _ in group.questions)]


def generate_answers(
    responder: Responder,
    question_set: QuestionSet,
    groups: Sequence[ClipGroup],
    batch_size: int,
    *,
    hidden: Collection[IntegrationKind] = (),
    show_progress: bool = True,
) -> Iterator[dict[int, Reply]]:
    """Answers every question about the clips of these groups.

    A clip is encoded once for all its questions, whatever the batch size.

    Args:
        hidden: integrations whose audio tokens the model may not attend to.

    Yields:
        index of the question -> answer, for one group.
    """
    total = sum(len(group.questions) for group in groups)
    is_text = isinstance(question_set, FeatureSet) and question_set.is_text
    with progress(total, "questions") if show_progress else nullcontext() as bar:
        for group in groups:
            clips = [question_set.clip(clip) for clip, _ in group.clips]
            prefix = None if is_text else responder.prefill(_features(question_set, group), hidden)
            answers: dict[int, Reply] = {}
            for first in range(0, len(group.questions), batch_size):
                batch = group.questions[first : first + batch_size]
                questions = [clips[row].questions[question_set.table.number[index]] for index, row in batch]
                if prefix is None:
                    replies = responder.answer_text(questions)
                else:
                    texts = [question.question for question in questions]
                    replies = responder.answer(prefix, texts, [row for _, row in batch])
                answers |= {index: reply for (index, _), reply in zip(batch, replies, strict=True)}
            yield answers
            if bar is not None:
                bar.advance(len(group.questions))


def _features(question_set: QuestionSet, group: ClipGroup) -> list[Features]:
    """Returns the features of the audio of each clip of a group."""
    return [question_set.features(clip, question_set.clip(clip).clip_id) for _, clip in group.clips]


def _run_job(job: Job, partition: Partition) -> None:
    """Generates the answers of one process."""
    parent, settings = os.getppid(), job.settings
    if settings.nproc > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.nproc))
    responder = _cached_responder(settings.model, settings.max_new_tokens, partition.index)
    question_set = open_question_set(job.source, settings.model)
    journal = job.journal
    groups = partition.select(group_clips(question_set.table, job.pairing, settings.batch_size))
    groups = unanswered_groups(groups, journal.read())
    with journal.open_file() as file:
        for answers in generate_answers(
            responder, question_set, groups, settings.batch_size, show_progress=partition.index == 0
        ):
            journal.append(file, answers)
            if settings.nproc > 1 and os.getppid() != parent:
                os._exit(EXIT_FAILURE)  # the command that started this process was killed


@lru_cache(maxsize=1)
def _cached_responder(model: Path, max_new_tokens: int, index: int) -> Responder:
    return load_responder(model, max_new_tokens, index)
