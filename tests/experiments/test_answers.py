"""A sweep's questions are answered by the stated rule, from the finished trials, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import validate_config
from pipeline.evaluation.intervals import bootstrap_ci95
from pipeline.experiments.answers import Answer, answer_questions
from pipeline.experiments.page import SweepResults, write_page
from pipeline.experiments.trials import SEED, SweepConfig, label_of, trial_name
from pipeline.tracking.reader import TrainedRun

CLIPS, SEEDS = 200, (0, 1, 2)
DEPTH, SIZE = "model.num_audio_layers", "model.language_model"


def sweep_of(*questions: Sequence[dict[str, Any]]) -> SweepConfig:
    configs = [{"question": f"Question {number}?", "runs": list(runs)} for number, runs in enumerate(questions)]
    values = {"name": "small", "experiment": "demo", "output": "unused", "questions": configs}
    return validate_config(SweepConfig, {**values, "seeds": list(SEEDS), "evaluate": ["sets/test"]}, "a sweep")


class Store:
    """Runs of trials, and which questions each of them answered correctly."""

    def __init__(self) -> None:
        self.runs: list[TrainedRun] = []
        self.correctness: dict[str, dict[str, Any]] = {}

    def add(self, settings: dict[str, Any], correct_clips: dict[int, int], loss: float = 1.0, size: int = 1000) -> None:
        """Adds runs; `correct_clips` is seed -> number of clips, the first ones, that are answered correctly."""
        for seed, count in correct_clips.items():
            name = trial_name({**settings, SEED: seed})
            correct = [clip < count for clip in range(CLIPS)]
            clips = [f"clip{clip}" for clip in range(CLIPS)]
            self.correctness[name] = {"question_id": clips, "clip_id": clips, "correct": correct}
            low, high = bootstrap_ci95(np.array(correct, dtype=float), clips)
            scores = {"accuracy": count / CLIPS, "ci95": [low, high], "by_domain": {}, "by_task": {}}
            self.runs.append(
                TrainedRun(
                    name=name,
                    label=name,
                    started=0.0,
                    tags={"git.commit": "abcdef0123"},
                    run_id=name,
                    status="FINISHED",
                    params={
                        "model.integration": "lal",
                        "model.language_model": str(settings.get(SIZE, "base")),
                        "train.seed": str(seed),
                        "resolved.total_parameters": str(size),
                        "resolved.audio_layers": "[[0, 1]]",
                    },
                    metrics={"validation/loss": loss * (1 + 0.001 * seed), "samples_per_s": 10.0},
                    losses=[],
                    evaluations={"test": scores},
                )
            )

    def answer(self, sweep: SweepConfig) -> list[Answer]:
        return answer_questions(sweep, self.runs, "test", lambda run, _: self.correctness[run.name])


@pytest.fixture
def store() -> Store:
    store = Store()
    store.add({}, {0: 100, 1: 102, 2: 98})
    return store


def conclusions(answers: Sequence[Answer]) -> list[list[str]]:
    return [[variant.conclusion for variant in each.variants] for each in answers]


def test_conclusions_follow_the_interval_of_the_difference(store: Store) -> None:
    store.add({DEPTH: 1}, {0: 60, 1: 62, 2: 58}, loss=2.0)
    store.add({DEPTH: 2}, {0: 140, 1: 142, 2: 139}, loss=0.5)
    store.add({DEPTH: 3}, {0: 101, 1: 101, 2: 98}, loss=0.9)
    (answer,) = store.answer(sweep_of([{}, {DEPTH: 1}, {DEPTH: 2}, {DEPTH: 3}]))
    assert conclusions([answer]) == [["", "worse", "better", "no difference seen"]]
    for variant, expected in zip(answer.variants[1:], (-0.2, 0.2 + 1 / 600, 0.0), strict=True):
        assert variant.difference is not None
        mean, low, high = variant.difference
        assert mean == pytest.approx(expected) and low < mean < high
    assert "worse: num_audio_layers 1" in answer.conclusion


def test_more_noise_between_seeds_widens_the_intervals(store: Store) -> None:
    store.add({DEPTH: 1}, {0: 60, 1: 62, 2: 58})
    store.add({DEPTH: 2}, {0: 10, 1: 190, 2: 100})
    quiet, noisy = store.answer(sweep_of([{}, {DEPTH: 1}])), store.answer(sweep_of([{}, {DEPTH: 1}, {DEPTH: 2}]))
    assert conclusions(quiet) == [["", "worse"]]
    assert conclusions(noisy) == [["", "no difference seen", "no difference seen"]]


def test_a_repetition_is_the_same_and_equal_accuracy_alone_is_not(store: Store) -> None:
    store.add({"data.workers": 0}, {0: 100, 1: 102, 2: 98})
    store.add({DEPTH: 1}, {0: 100, 1: 102, 2: 98}, loss=1.5)
    sweep = sweep_of([{}, {"data.workers": 0}, {DEPTH: 1}])
    assert conclusions(store.answer(sweep)) == [["", "the same", "no difference seen"]]


def test_missing_trials_are_reported(store: Store, tmp_path: Path) -> None:
    store.add({DEPTH: 1}, {1: 62})
    sweep = sweep_of([{}, {DEPTH: 1}, {DEPTH: 2}], [{DEPTH: 2}, {DEPTH: 3}])
    answers = store.answer(sweep)
    assert conclusions(answers)[1] == ["not run", "not run"]
    assert [len(v.runs) for v in answers[0].variants] == [3, 1, 0]
    assert answers[0].variants[2].conclusion == "not run"
    page = write(store, sweep, tmp_path)
    assert "4 finished of 12" in page and "not run: num_audio_layers 2" in page


def test_questions_share_their_trials() -> None:
    sweep = sweep_of([{}, {DEPTH: 1}], [{DEPTH: 1}, {DEPTH: 2}], [{}, {DEPTH: 2}])
    assert sweep.combinations() == [{}, {DEPTH: 1}, {DEPTH: 2}]


def test_labels_are_short() -> None:
    assert label_of({}) == ""
    assert label_of({SIZE: "runs/language_model_96", DEPTH: "1/2"}) == "language_model_96, num_audio_layers 1/2"


@pytest.mark.parametrize("jump", [1.0, 3.0])
def test_the_page_says_whether_the_largest_size_was_predicted(store: Store, tmp_path: Path, jump: float) -> None:
    """The loss is size ** -0.1 for all sizes, or three times that for the largest."""
    store = Store()
    for name, size, factor in (("a", 1000, 1.0), ("b", 4000, 1.0), ("c", 16000, jump)):
        store.add({SIZE: name}, {0: 100, 1: 101, 2: 99}, loss=factor * size**-0.1, size=size)
    page = write(store, sweep_of([{SIZE: "a"}, {SIZE: "b"}, {SIZE: "c"}]), tmp_path)
    assert f"{3 if jump == 1 else 0} of 3 inside" in page
    assert (tmp_path / "page" / "law.png").is_file()


def write(store: Store, sweep: SweepConfig, folder: Path) -> str:
    appendix = folder / "appendix.md"
    appendix.write_text("## Appendix\n")
    page = folder / "page.md"
    results = SweepResults(sweep, {}, store.runs, lambda run, _: store.correctness[run.name])
    files = write_page(page, results, command="a command", appended=[appendix])
    assert all(file.is_file() for file in files)
    text = page.read_text()
    assert all(f"page/{file.name})" in text for file in files if file.suffix == ".png")
    assert "`a command`" in text and text.endswith("## Appendix\n")
    return text
