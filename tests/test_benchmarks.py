"""Verdicts on awkward answers, as the official scorers give them (compared with them on 14,000 generated answers), and
as a reader would; layouts as published; folders that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from corpora import tone
from test_ask import folder  # noqa: F401 (a fixture)

from pipeline.benchmarks import BENCHMARKS, Esc50, Gtzan, LibriSpeech, Mmar, Mmau, Mmsu
from pipeline.benchmarks.multiple_choice import chosen
from pipeline.benchmarks.string_match import string_match
from pipeline.errors import UserError
from pipeline.evaluate import main

VOICES = ("A child", "A woman", "An adult man", "A teenager")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("A woman", True),
        ("a WOMAN.", True),
        ("woman a", True),  # a set of words has no order
        ("(B) A woman", True),
        ("It is a woman, I think", True),
        ("woman", False),  # one word of the answer is missing
        ("B", False),
        ("A woman, not a child", False),
        ("a woman and an owl", False),  # "an" is a word of a wrong choice alone
        ("a_woman", False),
        ("a-woman", True),
        ("a womän", False),
        ("", False),
        (" ... ", False),
    ],
)
def test_the_words_of_the_answer_and_of_no_other_choice(prediction: str, right: bool) -> None:
    assert string_match("A woman", prediction, VOICES) is right


def test_words_that_choices_share_are_no_fault() -> None:
    choices = ("Too little", "Too much, can't finish", "Too much")
    assert string_match("Too much", "too much", choices)
    assert not string_match("Too much", "too much can", choices), "an apostrophe parts two words"
    assert string_match("Too little", "too, too little", choices)


@pytest.mark.parametrize(
    ("prediction", "number"),
    [
        ("B", 1),
        ("(b)", 1),
        ("C.", 2),
        ("C. A woman", 2),  # the letter in front counts
        ("D) whatever", 3),
        ("The answer is B.", 1),
        ("a child", 0),  # not the letter A
        ("A woman", 1),
        ("Definitely a teenager!", 3),
        ("a woman or a child", None),
        ("E", None),
        ("Because of the noise", None),
        ("", None),
        ("None", None),
    ],
)
def test_the_choice_that_a_reader_would_say_is_meant(prediction: str, number: int | None) -> None:
    assert chosen(prediction, VOICES) == number


def test_of_choices_that_contain_each_other_the_longer_is_meant() -> None:
    assert chosen("I hear a big dog", ("dog", "big dog")) == 1
    assert chosen("I hear a dog", ("dog", "big dog")) == 0


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
    ("predictions", "official", "counted", "sane"),
    [
        (["B", "B. low", "(B)"], 1.0, 3, 3),  # of "(B)" the character before the last
        (["B", ""], 1.0, 2, 1),  # an empty answer is judged by the letter before it
        (["A", "", "None"], 0.0, 3, 0),
        (["", "B"], None, None, 1),  # with no letter before it the scorer ends with an error
        (["B", "no idea", "5"], 1.0, 1, 1),  # without a letter it does not count
        (["Because of noise", "B"], 1.0, 2, 1),  # "B" of Because
        (["low", "B"], 1.0, 1, 2),
        (["D", "\nB\n"], 0.5, 2, 1),
    ],
)
def test_mmsu_tells_the_official_number_and_a_sane_one(
    tmp_path: Path, predictions: list[str], official: float | None, counted: float | None, sane: int
) -> None:
    benchmark = write_mmsu(tmp_path, len(predictions))
    further = benchmark.further({str(number): text for number, text in enumerate(predictions)})
    assert further == {"official_accuracy": official, "official_questions": counted}
    verdicts = [benchmark.correct(*pair) for pair in zip(benchmark.items, predictions, strict=True)]
    assert sum(verdicts) == sane


def write_rows(kind: str, root: Path, **changes: Any) -> Path:
    root.mkdir(exist_ok=True)
    soundfile.write(root / "clip.wav", tone(0.5, 16000), 16000)
    row = {
        "id": "q1",
        "question": "Who speaks?",
        "choices": list(VOICES),
        "answer": "A woman",
        "sub-category": "Speaker",
        "extra": "kept",
    }
    row |= {"audio_id": "./clip.wav", "task": "speech"} if kind == "mmau" else {}
    row |= {"audio_path": "./clip.wav", "modality": "speech"} if kind == "mmar" else {}
    row |= changes
    rows = [{k: v for k, v in row.items() if v is not None}, {**row, "id": "q2", "question": "Who else?"}]
    name = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.jsonl"}[kind]
    text = json.dumps(rows) if kind == "mmau" else "\n".join(map(json.dumps, rows))
    (root / name).write_text(text)
    return root


def test_a_published_benchmark_is_evaluated_from_its_own_files(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    places = [f"{kind}={write_rows(kind, tmp_path / kind)}" for kind in ("mmau", "mmar")]
    out = ["--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "s.json"), "--max-new-tokens=3"]
    assert main([str(folder / "model"), *places, *out]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert set(scores) == {"mmau", "mmar"}
    for result in scores.values():
        assert (result["questions"], result["clips"]) == (2, 1)
        assert result["official_accuracy"] == result["accuracy"]
        assert 0 <= result["choice_accuracy"] <= 1
        assert set(result["by_domain"]) == {"speech"}
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    answers = {(line["benchmark"], line["question_id"]): line["prediction"] for line in lines}
    mmau = json.loads((tmp_path / "p.mmau.json").read_text())
    mmar = [json.loads(line) for line in (tmp_path / "p.mmar.jsonl").read_text().splitlines()]
    assert [row["model_output"] for row in mmau] == [answers["mmau", "q1"], answers["mmau", "q2"]]
    assert [row["answer_prediction"] for row in mmar] == [answers["mmar", "q1"], answers["mmar", "q2"]]
    assert {row["extra"] for row in [*mmau, *mmar]} == {"kept"}, "published rows are passed on whole"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"answer": "A robot"}, "question 1: 'A robot' is not among its choices"),
        ({"audio_id": "gone.wav"}, "2 of 2 audio files are missing"),
        ({"choices": None}, "question 1: has no choices"),
    ],
)
def test_a_benchmark_that_cannot_be_is_one_line(tmp_path: Path, changes: dict, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Mmau(write_rows("mmau", tmp_path, **changes))


def test_a_folder_without_the_file_names_it(tmp_path: Path) -> None:
    for kind in BENCHMARKS.values():
        with pytest.raises(UserError, match=r"holds (0 files named|no question)"):
            kind(tmp_path)
    write_rows("mmar", tmp_path)
    (tmp_path / "MMAR-meta.jsonl").write_text("{broken")
    with pytest.raises(UserError, match="neither a JSON list nor JSON lines"):
        Mmar(tmp_path)


def write_audio(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, tone(0.3, 16000), 16000)


def test_a_class_must_be_named_and_no_other(tmp_path: Path) -> None:
    for name in ("1-a.wav", "2-b.wav", "3-c.wav"):
        write_audio(tmp_path / "esc" / "audio" / name)
    (tmp_path / "esc" / "meta").mkdir()
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text(
        "filename,fold,category\n1-a.wav,1,dog\n2-b.wav,1,crying_baby\n3-c.wav,2,sea_waves\n"
    )
    esc = Esc50(tmp_path / "esc")
    assert [item.answer for item in esc.items] == ["dog", "crying baby", "sea waves"]
    assert "crying baby, dog, sea waves" in esc.items[0].prompt
    baby = esc.items[1]
    assert [esc.correct(baby, text) for text in ("A crying baby.", "a dog and a crying baby", "baby", "")] == [
        True,
        False,
        False,
        False,
    ]
    for name in ("jazz/jazz.00000.wav", "rock/rock.00000.wav"):
        write_audio(tmp_path / "gtzan" / "genres_original" / name)
    gtzan = Gtzan(tmp_path / "gtzan")
    assert [(item.question_id, item.answer) for item in gtzan.items] == [
        ("jazz/jazz.00000.wav", "jazz"),
        ("rock/rock.00000.wav", "rock"),
    ]
    assert gtzan.correct(gtzan.items[0], "It is jazz music")


def test_words_are_counted_over_the_whole_part(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    part = tmp_path / "test-clean"
    for name in ("1-2-0000", "1-2-0001"):
        write_audio(part / "1" / "2" / f"{name}.flac")
    (part / "1" / "2" / "1-2.trans.txt").write_text("1-2-0000 HE'S HERE\n1-2-0001 ONE TWO THREE\n")
    speech = LibriSpeech(part)
    assert [item.answer for item in speech.items] == ["HE'S HERE", "ONE TWO THREE"]
    assert speech.correct(speech.items[0], " He's — here!")
    assert not speech.correct(speech.items[0], "he is here")
    assert speech.further({"1-2-0000": "he's here", "1-2-0001": "one too three four"}) == {"wer": 2 / 5}
    assert speech.further({"1-2-0000": "", "1-2-0001": "one two three"}) == {"wer": 2 / 5}
    arguments = [f"librispeech={part}", "--json", str(tmp_path / "s.json"), "--max-new-tokens=2"]
    assert main([str(folder / "model"), *arguments]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["librispeech"]["wer"] > 0
