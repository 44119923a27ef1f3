"""`pal validate SHARDS`: checks files, hashes, shapes, counts and the order of clips of a finished feature set."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.job.commits import COMMITS, INDEX, REJECTS, Commit, column_names, merged_index, read_record
from data_prep.job.store import Store, open_store
from data_prep.statistics import Statistics
from pipeline.core.arguments import add_json, write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, run_command
from pipeline.core.feature_contract import CLIPS, FeatureContract, load_contract

DESCRIPTION = "Check files, hashes, shapes, counts and the order of clips of a finished feature set."


def main(argv: Sequence[str] | None = None) -> int:
    """Validates a feature set; returns 0 if it is valid and 1 if it has problems."""
    parser = argparse.ArgumentParser(prog="pal validate", description=DESCRIPTION)
    parser.add_argument("shards", metavar="feature_set", help="folder of the feature set")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot statistics of the set (.png, .pdf, .svg)")
    add_json(parser)
    args = parser.parse_args(argv)
    store = open_store(args.shards)
    with store.fetch("") as folder:  # copies only top-level files from an object store
        contract = load_contract(folder)
    statistics = Statistics()
    problems = find_problems(store, contract, statistics)
    for problem in problems:
        logger.error(problem)
    print(f"{contract.clips} clips, {contract.questions} questions, {len(problems)} problems")
    if args.picture is not None:
        from data_prep.plots import draw

        title = f"{args.shards}: {contract.clips} clips, {contract.audio_hours:.2f} hours"
        draw(statistics, title).savefig(args.picture, dpi=150)
    results = {"clips": contract.clips, "questions": contract.questions, "problems": problems}
    write_results(results, args.json)
    return EXIT_FAILURE if problems else 0


def find_problems(store: Store, contract: FeatureContract, statistics: Statistics | None = None) -> list[str]:
    """Returns the problems of a finished set, one line each, which begins with the file; empty when it is valid.

    The content of a partition is checked only if its files have the committed bytes.

    Args:
        statistics: statistics to fill, as far as the set can be read.
    """
    columns = column_names(contract.encoders)
    commits, problems = _read_commits(store, columns)
    totals = _Totals(statistics or Statistics())
    damaged: set[int] = set()
    for commit in commits:
        with contextlib.ExitStack() as stack:
            folders = {
                name: stack.enter_context(store.fetch(f"{name}/{column.folder}"))
                for name, column in commit.columns.items()
            }
            damage = list(_file_problems(commit, folders))
            if damage:
                damaged.add(commit.partition)
            problems += damage or _content_problems(commit, folders, contract, totals)
    for column in columns:
        problems += _index_problems(store, column, commits, bool(damaged))
    lines = store.read(REJECTS).splitlines() if store.size(REJECTS) is not None else []
    rejects = [json.loads(line) for line in lines]
    totals.statistics.rejects.update(reject["reason"] for reject in rejects)
    totals.rejected_questions.update(reject["question_id"] for reject in rejects if reject.get("question_id"))
    if not problems:
        problems += _total_problems(contract, totals)
    return problems


@dataclass
class _Totals:
    """Statistics and ids over all partitions.

    Attributes:
        other_clips: question id -> ids of the other clips of its conversation.
        rejected_questions: ids of the conversations in rejects.jsonl.
    """

    statistics: Statistics
    clip_ids: set[str] = field(default_factory=set)
    question_ids: set[str] = field(default_factory=set)
    other_clips: dict[str, list[str]] = field(default_factory=dict)
    rejected_questions: set[str] = field(default_factory=set)


def _read_commits(store: Store, columns: list[str]) -> tuple[list[Commit], list[str]]:
    commits: list[Commit] = []
    problems = []
    for name in store.list(COMMITS):
        commit = read_record(store, f"{COMMITS}/{name}")
        if commit is None or name != f"{commit.partition:05}.json" or sorted(commit.columns) != sorted(columns):
            problems.append(f"{COMMITS}/{name}: is not a commit record of this set")
        else:
            commits.append(commit)
    partitions = {commit.partition for commit in commits}
    for partition in range(max(partitions, default=0) + 1):
        if partition not in partitions and not problems:
            problems.append(f"{COMMITS}/{partition:05}.json: is missing")
    return commits, problems


def _file_problems(commit: Commit, folders: dict[str, Path]) -> Iterator[str]:
    from data_prep.job.mds_writer import hash_file

    for column, committed in commit.columns.items():
        for file in committed.files:
            name = f"{column}/{committed.folder}/{file.name}"
            path = folders[column] / file.name
            if not path.is_file():
                yield f"{name}: is missing"
            elif path.stat().st_size != file.bytes:
                yield f"{name}: has {path.stat().st_size} bytes, {file.bytes} were committed"
            elif hash_file(path).xxh64 != file.xxh64:
                yield f"{name}: does not have the hash that was committed"


def _index_problems(store: Store, column: str, commits: list[Commit], any_damage: bool) -> Iterator[str]:
    name = f"{column}/{INDEX}"
    if store.size(name) is None:
        yield f"{name}: is missing"
        return
    try:
        expected = merged_index(store, column, commits)
    except (OSError, ValueError, KeyError):
        if not any_damage:  # otherwise the damage is reported already and there is nothing to compare with
            raise
        return
    if store.read(name) != expected:
        yield f"{name}: is not the index of the committed partitions"


def _content_problems(
    commit: Commit, folders: dict[str, Path], contract: FeatureContract, totals: _Totals
) -> Iterator[str]:
    from data_prep.job.mds_writer import read_partition

    def folder(column: str) -> str:
        return f"{column}/{commit.columns[column].folder}"

    statistics = totals.statistics
    order = []
    for sample in read_partition(folders[CLIPS]):
        clip_id = sample["clip_id"]
        order.append(clip_id)
        if clip_id in totals.clip_ids:
            yield f"{folder(CLIPS)}: clip {clip_id} is in the set twice"
        totals.clip_ids.add(clip_id)
        statistics.durations_s.append(float(sample["duration_s"]))
        statistics.questions.append(len(sample["questions"]))
        statistics.domains[sample["domain"]] += 1
        for question in sample["questions"]:
            statistics.tasks[question["task"]] += 1
            if question["question_id"] in totals.question_ids:
                yield f"{folder(CLIPS)}: question {question['question_id']} of clip {clip_id} is in the set twice"
            totals.question_ids.add(question["question_id"])
            if question.get("clips"):
                totals.other_clips[question["question_id"]] = question["clips"]
    for name, encoder in contract.encoders.items():
        ids = []
        norms = statistics.norms.setdefault(name, [])
        for sample in read_partition(folders[name]):
            ids.append(sample["clip_id"])
            fault = _feature_problem(sample["features"], encoder.width)
            if fault is None:
                norms.append(float(np.sqrt(np.square(sample["features"], dtype=np.float32).mean())))
            else:
                yield f"{folder(name)}: features of clip {sample['clip_id']} {fault}"
        if ids != order:
            yield f"{folder(name)}: its clips differ from those of {folder(CLIPS)}"
    if len(order) != commit.clips:
        yield f"{folder(CLIPS)}: holds {len(order)} clips, {commit.clips} were committed"


def _feature_problem(features: Any, width: int) -> str | None:
    if features.dtype != np.float16:
        return f"are {features.dtype}, not float16"
    if features.ndim != 2 or features.shape[1] != width:
        return f"have shape {features.shape}, not (frames, {width})"
    if not np.isfinite(features).all():
        return "are not finite"
    return None


def _total_problems(contract: FeatureContract, totals: _Totals) -> Iterator[str]:
    if len(totals.clip_ids) != contract.clips:
        yield f"features.json: counts {contract.clips} clips, the shards hold {len(totals.clip_ids)}"
    if totals.statistics.rejects.total() != contract.rejected:
        yield f"{REJECTS}: holds {totals.statistics.rejects.total()} clips, features.json counts {contract.rejected}"
    absent = {
        question_id: next(clip_id for clip_id in clip_ids if clip_id not in totals.clip_ids)
        for question_id, clip_ids in totals.other_clips.items()
        if not totals.clip_ids.issuperset(clip_ids)
    }
    for question_id in sorted(absent.keys() - totals.rejected_questions):
        yield f"{CLIPS}: question {question_id} names clip {absent[question_id]}, which is not in the set"
    for question_id in sorted(totals.rejected_questions - absent.keys()):
        yield f"{REJECTS}: rejects question {question_id}, whose clips are in the set"
    questions = len(totals.question_ids) - len(absent)
    if questions != contract.questions:
        yield f"features.json: counts {contract.questions} questions, the shards hold {questions}"


if __name__ == "__main__":
    sys.exit(run_command(main))
