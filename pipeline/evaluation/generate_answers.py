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
from pipeline.evaluation.prompt_rows import prompt_rows
from pipeline.evaluation.question_sets import ClipNumbers, QuestionSet, QuestionSource, open_question_set
from pipeline.inference.decoding import greedy_decoding, log_decoding
from pipeline.inference.responder import Reply, Responder, load_responder

AudioPairing = Mapping[int, int]  # clip -> clip whose audio replaces its own: the same one, except in a control


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
    """Clips whose questions are answered together.

    Attributes:
        questions: indices of the questions, clip by clip.
        audio: clip -> the clip whose audio replaces its own; other clips keep theirs. None: the prompts have no audio
            and no placeholders.
    """

    questions: Sequence[int]
    audio: AudioPairing | None


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
    clips: Sequence[int]
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

    def generate(
        self, question_set: QuestionSet, source: QuestionSource, clips: Sequence[int], pairing: AudioPairing
    ) -> dict[int, Reply]:
        """Returns index of the question -> answer for those questions about `clips` that the journal now answers: all
        of them, unless other machines still work on their partitions.

        Args:
            question_set: the question set of `source`.
            pairing: clip -> the clip whose audio replaces its own, in questions about other clips too.

        Raises:
            UserError: a damaged feature set, or a question that the model cannot take.
            BrokenProcessPool: a process was killed.
        """
        identity = question_set.contract.dump() if isinstance(question_set, FeatureSet) else question_set.identity
        fingerprint = fingerprint_job(self._model_fingerprint, self.decoding, pairing, f"{identity} {list(clips)}")
        job = Job(self.settings, source, pairing, clips, fingerprint)
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


def group_clips(
    table: QuestionTable, pairing: AudioPairing, batch_size: int, clips: Collection[int] | None = None
) -> list[ClipGroup]:
    """Groups clips whose questions fit into one batch together; a clip with more questions is a group of its own.

    Clips with the longest audio come first, so that the clips of a group have similar lengths.

    Args:
        clips: clips whose questions are answered; None means all of `pairing`, which may hold more: the other clips of
            conversations.
    """
    selected = pairing if clips is None else clips
    questions: dict[int, list[int]] = {clip: [] for clip in selected}
    for index, clip in enumerate(table.clip.tolist()):
        if clip in questions:
            questions[clip].append(index)
    order = sorted((clip for clip in questions if questions[clip]), key=lambda c: (-table.duration_s[pairing[c]], c))
    groups: list[list[int]] = []
    filled = batch_size
    for clip in order:
        if filled + len(questions[clip]) > batch_size:
            groups.append([])
            filled = 0
        groups[-1].append(clip)
        filled += len(questions[clip])
    return [ClipGroup([index for clip in group for index in questions[clip]], pairing) for group in groups]


def unanswered_groups(groups: Sequence[ClipGroup], answered: Collection[int]) -> list[ClipGroup]:
    """Returns the groups with at least one question that is not answered."""
    done = set(answered)
    return [group for group in groups if any(index not in done for index in group.questions)]


def generate_answers(
    responder: Responder,
    question_set: QuestionSet,
    groups: Sequence[ClipGroup],
    batch_size: int,
    *,
    hidden: Collection[IntegrationKind] = (),
    show_progress: bool = True,
) -> Iterator[dict[int, Reply]]:
    """Answers every question of these groups.

    Of a conversation the last answer is generated; the answers of its earlier turns are those of the set. A clip is
    encoded once for all questions that begin alike, whatever the batch size.

    Args:
        hidden: integrations whose audio tokens the model may not attend to.

    Yields:
        index of the question -> answer, for one group.
    """
    total = sum(len(group.questions) for group in groups)
    clip_numbers = ClipNumbers(question_set)
    with progress(total, "questions") if show_progress else nullcontext() as bar:
        for group in groups:
            answers: dict[int, Reply] = {}
            for rows in prompt_rows(responder, question_set, clip_numbers, group.questions, group.audio, batch_size):
                prefix = rows.prefill(responder, question_set, hidden)
                for first in range(0, len(rows.questions), batch_size):
                    batch = rows.questions[first : first + batch_size]
                    questions, row_numbers = [question for *_, question in batch], [row for _, row, _ in batch]
                    replies = responder.answer(prefix, questions, row_numbers)
                    answers |= {index: reply for (index, *_), reply in zip(batch, replies, strict=True)}
            yield answers
            if bar is not None:
                bar.advance(len(group.questions))


def _run_job(job: Job, partition: Partition) -> None:
    """Generates the answers of one process."""
    parent, settings = os.getppid(), job.settings
    if settings.nproc > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.nproc))
    responder = _cached_responder(settings.model, settings.max_new_tokens, partition.index)
    question_set = open_question_set(job.source, settings.model)
    journal = job.journal
    groups = partition.select(group_clips(question_set.table, job.pairing, settings.batch_size, job.clips))
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
