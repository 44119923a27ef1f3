"""MMSU's official accuracy follows the quirks of its scorer; accuracy does not."""

import json
from pathlib import Path

import pytest

from pipeline.evaluation.benchmarks import Mmsu


def write_mmsu(root: Path, count: int) -> Mmsu:
    rows = [
        {
            "id": number,
            "audio_path": "a.wav",
            "task_name": "tone",
            "question": "Which?",
            "choice_a": "high",
            "choice_b": "low",
            "choice_c": "level",
            "answer_gt": "low",
            "category": "Perception",
        }
        for number in range(count)
    ]
    root.mkdir(exist_ok=True)
    (root / "a.wav").touch()
    (root / "mmsu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Mmsu(root)


@pytest.mark.parametrize(
    ("predictions", "official", "counted", "correct"),
    [
        (["B", "B. low", "(B)"], 1.0, 3, 3),  # of "(B)" the character before the last
        (["B", ""], 1.0, 2, 1),  # an empty answer is scored by the letter before it
        (["A", "", "None"], 0.0, 3, 0),
        (["", "B"], None, None, 1),  # without a letter before it the scorer fails
        (["B", "no idea", "5"], 1.0, 1, 1),  # without a letter it does not count
        (["Because of noise", "B"], 1.0, 2, 1),  # "B" of Because
        (["low", "B"], 1.0, 1, 2),
        (["D", "\nB\n"], 0.5, 2, 1),
    ],
)
def test_mmsu_reports_official_accuracy_beside_accuracy(
    tmp_path: Path, predictions: list[str], official: float | None, counted: float | None, correct: int
) -> None:
    benchmark = write_mmsu(tmp_path, len(predictions))
    extra_metrics = benchmark.extra_metrics({str(number): text for number, text in enumerate(predictions)})
    assert extra_metrics == {"official_accuracy": official, "official_questions": counted}
    assert sum(benchmark.is_correct(*pair) for pair in zip(benchmark.items, predictions, strict=True)) == correct


def test_a_missing_choice_does_not_move_the_letters_after_it(tmp_path: Path) -> None:
    mmsu = write_mmsu(tmp_path, 1)
    row = {**mmsu.items[0].row, "choice_b": None, "answer_gt": "level"}
    mmsu.file.write_text(json.dumps(row))
    mmsu = Mmsu(tmp_path)
    assert "A. high\nC. level\n" in mmsu.items[0].prompt
    assert [mmsu.is_correct(mmsu.items[0], letter) for letter in "ABC"] == [False, False, True]
    assert mmsu.extra_metrics({"0": "C"})["official_accuracy"] == 1.0
