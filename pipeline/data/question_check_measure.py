"""Measures every question of a feature set in parallel: its text tokens, or why it cannot be tokenised. Does not know
any bound."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from numpy.typing import NDArray

from pipeline.core.choices import choice_texts, chosen, letters_offered
from pipeline.core.class_names import named
from pipeline.core.console import progress
from pipeline.core.errors import EXIT_FAILURE, UserError
from pipeline.core.feature_contract import Question
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.feature_set import FeatureSet, questions_of
from pipeline.data.mds_reader import MdsReader

QUESTIONS_PER_TASK = 4096
MIN_QUESTIONS_FOR_PROCESSES = 20_000  # starting a process takes as long as tokenising about this many questions
Fault = tuple[str, str, str]  # reason, fault, remedy


@dataclass(frozen=True)
class Measurements:
    """What the check of a set measured.

    Attributes:
        prefix_tokens, suffix_tokens: (questions,) tokens up to and including the first placeholder, and after it.
        faults: index of a question that cannot be tokenised -> reason, fault and remedy.
    """

    prefix_tokens: NDArray[np.int64]
    suffix_tokens: NDArray[np.int64]
    faults: dict[int, Fault]

    @property
    def text_tokens(self) -> NDArray[np.int64]:
        """(questions,) tokens of each question, a clip counted as one."""
        return self.prefix_tokens + self.suffix_tokens


@dataclass(frozen=True)
class _Task:
    """Clips [first_clip, last_clip), whose questions begin at index `first_question`, without those `left_out`."""

    first_clip: int
    last_clip: int
    first_question: int
    left_out: frozenset[str]


@dataclass(frozen=True)
class _Part:
    """What a task measured: the first question, (questions, 2) token counts, and see `Measurements`."""

    first_question: int
    tokens: NDArray[np.int32]
    faults: dict[int, Fault]


def measure(feature_set: FeatureSet, chat_template: ChatTemplate, processes: int) -> Measurements:
    """Measures all questions of a set, and shows the progress.

    Args:
        processes: number of processes for a large set; a small one is measured in this process.

    Raises:
        UserError: a damaged shard.
        BrokenProcessPool: a process was killed.
    """
    table = feature_set.table
    tokens = np.zeros((len(table), 2), np.int64)
    faults: dict[int, Fault] = {}
    parts = _measure_here if processes == 1 or len(table) < MIN_QUESTIONS_FOR_PROCESSES else _measure_in_processes
    with progress(len(table), "questions checked") as bar:
        for part in parts(feature_set, chat_template, processes):
            tokens[part.first_question : part.first_question + len(part.tokens)] = part.tokens
            faults |= part.faults
            bar.advance(len(part.tokens))
    return Measurements(tokens[:, 0], tokens[:, 1], dict(sorted(faults.items())))


def _tasks(feature_set: FeatureSet) -> list[_Task]:
    """Returns tasks of about `QUESTIONS_PER_TASK` questions each."""
    clip = feature_set.table.clip
    tasks = []
    first = 0
    while first < len(clip):
        last_clip = int(clip[min(first + QUESTIONS_PER_TASK, len(clip)) - 1]) + 1
        tasks.append(_Task(int(clip[first]), last_clip, first, feature_set.left_out))
        first = int(np.searchsorted(clip, last_clip))
    return tasks


def _measure_here(feature_set: FeatureSet, chat_template: ChatTemplate, _: int) -> Iterator[_Part]:
    for task in _tasks(feature_set):
        yield _measure_task(feature_set.clips, chat_template, task, is_text=feature_set.is_text)


def _measure_in_processes(feature_set: FeatureSet, chat_template: ChatTemplate, processes: int) -> Iterator[_Part]:
    tasks = _tasks(feature_set)
    context = multiprocessing.get_context("spawn")  # CUDA, gloo and the threads of torch do not survive a fork
    with ProcessPoolExecutor(
        min(processes, len(tasks)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(feature_set.clips, chat_template, feature_set.is_text),
    ) as pool:
        try:
            for future in as_completed([pool.submit(_measure_in_worker, task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[MdsReader, ChatTemplate, bool] | None = None  # of a worker process: what `_measure_in_processes` gave it


def _start_worker(clips: MdsReader, chat_template: ChatTemplate, is_text: bool) -> None:
    global _worker
    _worker = clips, chat_template, is_text
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already use every core
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process with its parent: a worker whose parent was killed would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(EXIT_FAILURE)


def _measure_in_worker(task: _Task) -> _Part:
    if _worker is None:
        raise RuntimeError("the worker was not initialized")
    clips, chat_template, is_text = _worker
    return _measure_task(clips, chat_template, task, is_text=is_text)


def _measure_task(clips: MdsReader, chat_template: ChatTemplate, task: _Task, *, is_text: bool) -> _Part:
    samples = (clips[index] for index in range(task.first_clip, task.last_clip))
    questions = [question for sample in samples for question in questions_of(sample, task.left_out)]
    tokens = np.zeros((len(questions), 2), np.int32)
    faults: dict[int, Fault] = {}
    lengths = _lengths(chat_template, questions, is_text)
    for number, (question, length) in enumerate(zip(questions, lengths, strict=True)):
        index = task.first_question + number
        if isinstance(length, UserError):
            faults[index] = ("text", length.fault, length.remedy)
            continue
        tokens[number] = length
        if (fault := _answer_fault(question)) is not None:
            faults[index] = fault
    return _Part(task.first_question, tokens, faults)


def _lengths(
    chat_template: ChatTemplate, questions: Sequence[Question], is_text: bool
) -> list[tuple[int, int] | UserError]:
    """Returns the tokens of each question before and after its first placeholder, or why it has none."""
    try:
        return list(chat_template.token_counts(questions, audio=not is_text))
    except UserError as error:  # tokenised again in halves, until the question at fault is alone
        if len(questions) == 1:
            return [error]
    middle = len(questions) // 2
    halves = questions[:middle], questions[middle:]
    return [length for half in halves for length in _lengths(chat_template, half, is_text)]


def _answer_fault(question: Question) -> Fault | None:
    """Returns the fault of a question that has no answer to train on, or one that names none of its choices."""
    answers = [turn.content for turn in question.conversation if turn.role == "assistant" and turn.loss]
    if any(not "".join(map(str, answer)).strip() for answer in answers):
        return "text", "has an empty answer", "add it, or leave the question out of the manifest"
    choices = choice_texts(question)
    if not any(choices):
        return None
    if chosen(question.answer, choices, letters_offered=letters_offered(question)) is not None:
        return None
    if named(question.answer, choices):  # several of them
        return None
    return "choices", f"has the answer {question.answer!r}, which is none of its choices", "correct or remove it"
