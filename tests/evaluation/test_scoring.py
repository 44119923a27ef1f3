"""Exact match, the cluster bootstrap and the baseline that does not listen."""

import random

import numpy as np
import pytest

from pipeline.evaluation.scoring import MajorityBaseline, Prediction, bootstrap_ci95, exact_match, normalise, score


def make(clip: int, correct: bool, *, task: str = "what", domain: str = "sound", number: int = 0) -> Prediction:
    return Prediction(f"q{clip}-{number}", f"c{clip}", domain, task, "What?", "dog", "dog" if correct else "cat")


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Dog.", "dog"),
        ("  two   notes\n", "Two notes"),
        ("high-pitched", "high pitched"),
        ("it's rising!", "its rising"),
        ("it’s", "IT'S"),
        ("“Rising”", "rising"),
        ("CAFÉ", "cafe\u0301"),
        ("−2", "-2"),
        ("3.5 s.", "3.5 s"),
        ("a, b; c", "a b c"),
    ],
)
def test_writing_does_not_matter(prediction: str, answer: str) -> None:
    assert exact_match(prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("dogs", "dog"),
        ("3.5", "35"),
        ("3.5", "3 5"),
        ("-2", "2"),
        ("C#", "C"),
        ("5%", "5"),
        ("", "dog"),
        ("a b", "b a"),
    ],
)
def test_meaning_does_matter(prediction: str, answer: str) -> None:
    assert not exact_match(prediction, answer)


def test_normalise_is_idempotent() -> None:
    for text in ("3.5 s.", "C# - D#", "it's", " a/b 3/4 ", "İstanbul", "--2", "... 7.", "ﬁne"):
        assert normalise(normalise(text)) == normalise(text)


def test_score_groups_add_up_to_the_whole() -> None:
    predictions = [
        make(
            clip,
            correct=clip % 3 != 0,
            task=("what", "count")[number],
            domain=("sound", "music")[clip % 2],
            number=number,
        )
        for clip in range(30)
        for number in range(2)
    ]
    result = score(predictions)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["questions"] == 60
    assert result["clips"] == 30
    for groups in (result["by_task"], result["by_domain"]):
        assert sum(g["questions"] for g in groups.values()) == 60
        pooled = sum(g["accuracy"] * g["questions"] for g in groups.values()) / 60
        assert pooled == pytest.approx(result["accuracy"])
        assert all(g["ci95"][0] <= g["accuracy"] <= g["ci95"][1] for g in groups.values())


def test_score_depends_on_neither_order_nor_call() -> None:
    predictions = [make(clip, correct=clip % 4 != 0, number=n) for clip in range(40) for n in range(1 + clip % 3)]
    shuffled = random.Random(1).sample(predictions, len(predictions))
    assert score(predictions) == score(shuffled) == score(predictions)


def test_score_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([])


def test_bootstrap_counts_clips_not_questions() -> None:
    """Repeating every clip's verdict over ten questions adds no evidence: the interval must not shrink."""
    verdicts = np.random.default_rng(0).random(100) < 0.7
    clips = [f"c{i}" for i in range(100)]
    once = bootstrap_ci95(verdicts.astype(float), clips)
    tenfold = bootstrap_ci95(np.repeat(verdicts.astype(float), 10), [c for c in clips for _ in range(10)])
    assert once == pytest.approx(tenfold)
    binomial_width = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert once[1] - once[0] == pytest.approx(binomial_width, rel=0.25)


def test_bootstrap_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = (rng.random(80) < 0.6).astype(float)
        low, high = bootstrap_ci95(values, [str(i) for i in range(80)], seed=trial)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_commonest_answer_by_wording_then_task_then_all() -> None:
    guess = MajorityBaseline(
        [
            ("what", "Which animal?", "Dog"),
            ("what", "Which animal?", "dog."),
            ("what", "Which animal?", "cat"),
            ("what", "Which instrument?", "flute"),
            ("count", "How many?", "3"),
            ("count", "How many?", "2"),
        ]
    )
    assert guess("what", "which animal") == "dog"
    assert guess("what", "Which bird?") == "dog"
    assert guess("count", "How many?") == "2"  # a tie goes to the first in the alphabet
    assert guess("unknown", "Why?") == "dog"
    assert MajorityBaseline([])("what", "Which?") == ""
