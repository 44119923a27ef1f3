"""Exact match, scores by group, and the majority baseline."""

import random

import pytest

from pipeline.core.text_forms import exact_match, normalise
from pipeline.evaluation.scoring import MajorityBaseline, Prediction, score


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
        ("don\u2018t", "don't"),
        ("don\u02bct", "don't"),
        ("don`t", "don't"),
        ("don\u00b4t", "don't"),
        ("don\uff07t", "don't"),
        ("\uff24og", "dog"),  # full width
        ("\ufb01ne", "fine"),  # a ligature
        ("d\u00ado\u200bg\ufeff", "dog"),  # soft hyphen, zero-width space, byte order mark
        ("\u20132", "-2"),
        ("2\u00bd", "2 1/2"),
        ("C\u266f", "C#"),
        ("5 %", "5%"),
        ("door_wood_knock", "door wood knock"),
        ("?", "?"),
    ],
)
def test_spelling_variants_match(prediction: str, answer: str) -> None:
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
        ("", "?"),
        ("!", "?"),
        ("10\u00b2", "102"),
        ("2\u00bd", "21/2"),
    ],
)
def test_different_meanings_do_not_match(prediction: str, answer: str) -> None:
    assert not exact_match(prediction, answer)


def test_normalise_is_idempotent() -> None:
    for text in (
        "3.5 s.",
        "C# - D#",
        "it's",
        " a/b 3/4 ",
        "İstanbul",
        "--2",
        "... 7.",
        "ﬁne",
        "2½",
        "10²",
        "5 %",
        "C♯",
    ):
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


def test_scores_are_deterministic_and_independent_of_order() -> None:
    predictions = [make(clip, correct=clip % 4 != 0, number=n) for clip in range(40) for n in range(1 + clip % 3)]
    shuffled = random.Random(1).sample(predictions, len(predictions))
    assert score(predictions) == score(shuffled) == score(predictions)


def test_no_predictions_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([])


def test_the_majority_answer_is_by_wording_then_task_then_all() -> None:
    baseline = MajorityBaseline(
        [
            ("what", "Which animal?", "Dog"),
            ("what", "Which animal?", "dog."),
            ("what", "Which animal?", "cat"),
            ("what", "Which instrument?", "flute"),
            ("count", "How many?", "3"),
            ("count", "How many?", "2"),
        ]
    )
    assert baseline.predict("what", "which animal") == "dog"
    assert baseline.predict("what", "Which bird?") == "dog"
    assert baseline.predict("count", "How many?") == "2"  # of equally frequent answers the alphabetically first one
    assert baseline.predict("unknown", "Why?") == "dog"
    assert MajorityBaseline([]).predict("what", "Which?") == ""
