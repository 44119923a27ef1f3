"""A reader that knows every answer scores 1 and a silent one 0, by every rule, in every layout of one ground truth."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.feature_contract import Question, load_contract
from pipeline.evaluate import main
from tests.helpers.corpora import prepare_config, prepare_here
from tests.helpers.published import write_audio, write_text
from tests.helpers.readers import use_reader

CHOICES = (
    ("thirteen", "twenty", "Thirteen", "five"),
    ("caf\u00e9", "bar", "it\u2019s a pub", "none"),
    ("3.5", "35", "3", "5"),
    ("no", "nothing", "not known", "none of them"),
    ("dog", "big dog", "dog, then a cat", "cat"),
    ("a man", "A woman \u2013 singing", "an \u201calarm\u201d", "All of the above"),
    ("\u72ac", "\u0441\u043e\u0431\u0430\u043a\u0430", "\u0643\u0644\u0628", "hund & katt"),
    ("A dog", "B flat", "the answer is C", "None"),
    ("x\ty", "line\u2028two", "  padded  ", "<audio> [[answer]]"),
    ("(A) rain", "(B) snow", "(C) hail", "(D) rain and snow"),
    ("5%", "5 dB", "-5", "4:30"),
)
LETTERS_AND_SYMBOLS = (("A", "B\u266d", "B", "C#"), ("A > B", "A < B", "\u266a", "?"))


def rows(groups: Any) -> list[dict[str, Any]]:
    """Returns a row for each choice of each group, with the keys of MMAU, MMAR and MMSU."""
    return [
        {
            "id": f"{number}-{right}",
            "question": f'Which one is "it", no. {number}?',
            "choices": list(choices),
            **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)},
            "answer": choices[right],
            "answer_gt": choices[right],
            **dict.fromkeys(("audio_id", "audio_path"), "a.wav"),
            **dict.fromkeys(("task", "modality", "category"), "speech"),
            **dict.fromkeys(("sub-category", "task_name"), "s"),
        }
        for number, choices in enumerate(groups)
        for right in range(len(choices))
    ]


def write_layout(kind: str, root: Path, groups: Any) -> Path:
    write_audio(root / "a.wav")
    name = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.json", "mmsu": "mmsu.json"}[kind]
    (root / name).write_text("\ufeff" + json.dumps(rows(groups), ensure_ascii=False), encoding="utf-8")
    return root


def write_set(root: Path, groups: Any) -> Path:
    """Prepares a set with one question for each row."""
    write_audio(root / "a.wav")
    questions = [{key: row[key] for key in ("question", "choices", "answer")} for row in rows(groups)]
    manifest = root / "m.jsonl"
    manifest.write_text(json.dumps({"clip_id": "a", "audio": "a.wav", "questions": questions}) + "\n")
    prepare_here(prepare_config(manifest, root / "set"))
    assert load_contract(root / "set").questions == len(questions)
    return root / "set"


@pytest.fixture
def evaluate(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Returns the scores of a reader by `pal evaluate`."""

    def run(location: str, answer: Callable[[Question], str]) -> dict[str, Any]:
        use_reader(monkeypatch, answer)
        file = tmp_path / "scores.json"
        assert main([str(exported / "model"), location, "--json", str(file)]) == 0
        (scores,) = json.loads(file.read_text()).values()
        return dict(scores)

    return run


def text(question: Question) -> str:
    return question.answer


def silence(_: Question) -> str:
    return ""


def letter_of(groups: Any) -> Callable[[Question], str]:
    letters = {}
    for row in rows(groups):
        letters[row["question"], row["answer"].strip()] = "ABCD"[row["choices"].index(row["answer"])]
    return lambda question: letters[
        re.search(r'Which one is "it", no. \d+\?', question.question)[0], question.answer.strip()
    ]  # type: ignore[index]


def letter_with_text_of(groups: Any) -> Callable[[Question], str]:
    letter = letter_of(groups)
    return lambda question: f"{letter(question)}. {question.answer}"


@pytest.mark.parametrize("kind", ["mmau", "mmar"])
def test_words_are_matched_officially_and_letters_count_as_choices(
    kind: str, tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    location = f"{kind}={write_layout(kind, tmp_path / kind, CHOICES)}"
    perfect, silent = evaluate(location, text), evaluate(location, silence)
    for rule in ("accuracy", "official_accuracy", "choice_accuracy"):
        assert (perfect[rule], silent[rule]) == (1.0, 0.0), rule
    for reader in (
        letter_of(CHOICES),
        letter_with_text_of(CHOICES),
        lambda q: f"The answer is ({letter_of(CHOICES)(q)})",
    ):
        assert evaluate(location, reader)["choice_accuracy"] == 1.0
    location = f"{kind}={write_layout(kind, tmp_path / 'symbols', LETTERS_AND_SYMBOLS)}"
    assert evaluate(location, text)["choice_accuracy"] == 1.0


@pytest.mark.parametrize("groups", [CHOICES, LETTERS_AND_SYMBOLS])
def test_letters_and_texts_are_choices_of_mmsu_and_of_prepared_sets(
    groups: Any, tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    readers = [letter_of(groups), letter_with_text_of(groups), lambda q: f"({letter_of(groups)(q).lower()})"]
    for location in (f"mmsu={write_layout('mmsu', tmp_path, groups)}", str(write_set(tmp_path, groups))):
        for number, reader in enumerate(readers):
            assert evaluate(location, reader)["accuracy"] == 1.0, (location, number)
        if (
            groups is CHOICES or "mmsu" not in location
        ):  # MMSU wants a letter, also where it is the text of another choice
            assert evaluate(location, text)["accuracy"] == 1.0
        assert evaluate(location, silence)["accuracy"] == 0.0
    official = evaluate(f"mmsu={tmp_path}", letter_of(groups))
    assert official["official_accuracy"] == 1.0


CLASSES = ("clock_tick", "Hip-Hop", "Car", "Alarm", "Car alarm", "R&B", "door_wood_knock", "caf\u00e9 noise")
ANSWERS = (
    *CLASSES, *(name.replace("_", " ").replace("-", "").upper() for name in CLASSES), "I hear a car, and an alarm.",
    "car alarm", "It is a caf\u00e9-noise!", "a car alarm, a car", "hiphop music", "door wood-knock", "nothing", "",
)  # fmt: skip


@pytest.mark.parametrize("count", [len(CLASSES), 50])
def test_prepared_class_folders_score_like_the_published_layout(
    count: int, tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    classes = [*CLASSES, *(f"sound_{number}x" for number in range(count - len(CLASSES)))]
    lines = ["filename,fold,category"]
    for number, name in enumerate(classes):
        write_audio(tmp_path / "esc" / "audio" / f"{number}.wav")
        write_audio(tmp_path / "folders" / name / f"{number}.wav")
        lines.append(f"{number}.wav,1,{name}")
    write_text(tmp_path / "esc" / "meta" / "esc50.csv", "\n".join(lines))
    table = {"question": "Which sound is this?"}
    prepare_here(prepare_config(tmp_path / "folders", tmp_path / "set", table=table))
    locations = (str(tmp_path / "set"), f"esc50={tmp_path / 'esc'}")
    assert [evaluate(location, text)["accuracy"] for location in locations] == [1.0, 1.0]
    assert [evaluate(location, silence)["accuracy"] for location in locations] == [0.0, 0.0]
    for answer in ANSWERS:
        of_set, of_layout = (evaluate(location, lambda _, answer=answer: answer) for location in locations)
        assert of_set["accuracy"] == of_layout["accuracy"], answer


def test_free_answers_are_right_when_they_are_the_published_ones(
    tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    texts = [
        "A dog\u2019s bark, then: caf\u00e9 noise",
        '"Hello," a man says',
        "\u72ac\u304c\u5420\u3048\u308b",
        "3.5 s of rain & hail",
    ]
    clips = ["-abcdefghi_", "Y0123456789", "aaaaaaaaaaa", "A_bcdefghij"]
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
        writer.writerows([n, clip, 0, caption] for n, (clip, caption) in enumerate(zip(clips, texts, strict=True)))
    with (tmp_path / "clotho_captions_evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption_1", "caption_2"])
        writer.writerows([f"{clip}.wav", caption, ""] for clip, caption in zip(clips, texts, strict=True))
    for clip in clips:
        write_audio(tmp_path / "evaluation" / f"{clip}.wav")
    for kind in ("audiocaps", "clotho"):
        perfect, silent = (evaluate(f"{kind}={tmp_path}", reader) for reader in (text, silence))
        assert (perfect["accuracy"], silent["accuracy"], silent["cider"]) == (1.0, 0.0, 0.0)
        assert perfect["cider"] > 2
    speech = tmp_path / "speech"
    spoken = ["IT'S A DOG", "CAF\u00c9 NOISE", "ONE"]
    for number in range(len(spoken)):
        write_audio(speech / "1" / "2" / f"1-2-{number}.flac")
    write_text(speech / "1" / "2" / "1-2.trans.txt", "".join(f"1-2-{n} {line}\n" for n, line in enumerate(spoken)))
    perfect, silent = (evaluate(f"librispeech={speech}", reader) for reader in (text, silence))
    assert [(scores["accuracy"], scores["wer"]) for scores in (perfect, silent)] == [(1.0, 0.0), (0.0, 1.0)]
