"""An answer means one choice or none; benchmarks are evaluated from their own files; wrong folders are refused."""

import json
import unicodedata
from pathlib import Path

import pytest

from pipeline.core.choices import chosen
from pipeline.core.errors import UserError, run_command
from pipeline.evaluate import main
from pipeline.evaluation.benchmarks import BENCHMARKS, Mmar, Mmau
from tests.helpers.published import VOICES, write_audio, write_rows, write_text


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
def test_an_answer_means_one_choice_or_none(prediction: str, number: int | None) -> None:
    assert chosen(prediction, VOICES) == number


def test_of_choices_that_contain_each_other_the_longer_one_is_meant() -> None:
    assert chosen("I hear a big dog", ("dog", "big dog")) == 1
    assert chosen("I hear a dog", ("dog", "big dog")) == 0


@pytest.mark.parametrize(
    ("prediction", "number"),
    [
        ("Answer: B", 1),
        ("answer: b", 1),
        ("b.", 1),
        ("**B**", 1),
        ("\uff22", 1),  # full width
        ("B\u200b", 1),
        ("The correct answer is (b).", 1),
        ("Answer: a teenager", 3),  # an article
        ("The answer is A teenager", 3),
        ("The answer is A because it is high", 0),
        ("A or B", None),
        ("A, B", None),
        ("The answers differ", None),
        ("a teen\u00adager", 3),
    ],
)
def test_a_letter_counts_however_it_is_written(prediction: str, number: int | None) -> None:
    assert chosen(prediction, VOICES) == chosen(prediction, VOICES, letters_offered=True) == number


def test_a_letter_is_a_text_where_a_choice_is_one_and_letters_were_not_offered() -> None:
    notes = ("D", "A", "C#", "C")
    for prediction, number, offered in (("A", 1, 0), ("The answer is A", 1, 0), ("C\u266f", 2, 2), ("C", 3, 2)):
        assert chosen(prediction, notes) == number
        assert chosen(prediction, notes, letters_offered=True) == offered


def test_a_choice_that_stands_twice_is_one_choice() -> None:
    numbers = ("thirteen", "twenty", "Thirteen", "five")
    for prediction in ("thirteen", "I hear thirteen of them.", "THIRTEEN!"):
        assert chosen(prediction, numbers) == 0
    assert chosen("C", numbers) == 2
    assert chosen("twenty or thirteen", numbers) is None


def test_choices_that_differ_in_punctuation_alone_stay_apart() -> None:
    choices = ("Let's eat, grandma", "Let's eat grandma", "A > B", "A < B", "5%", "5", "\u266a", "?")
    assert [chosen(choice, choices) for choice in choices] == list(range(len(choices)))
    assert chosen("lets eat grandma", choices) is None
    assert chosen("It is 5 %", choices) == 4


CHOICES = (
    ["thirteen", "twenty", "thirteen", "five"],
    ["caf\u00e9", "bar", "it\u2019s a pub", "none"],
    ["A", "B\u266d", "B", "C#"],
    ["3.5", "35", "3", "5"],
    ["no", "nothing", "not known", "none of them"],
)


@pytest.mark.parametrize("kind", ["mmau", "mmar", "mmsu"])
def test_a_reader_who_knows_every_answer_scores_one_and_a_silent_one_nothing(tmp_path: Path, kind: str) -> None:
    rows = [
        {
            "id": f"{choices[0]}-{right}",
            "question": "Which?",
            "choices": choices,
            **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)},
            "answer": choices[right],
            "answer_gt": choices[right],
            "audio_id": "a.wav",
            "audio_path": "a.wav",
            "task": "speech",
            "modality": "speech",
            "category": "speech",
            "sub-category": "s",
            "task_name": "s",
        }
        for choices in CHOICES
        for right in range(4)
    ]
    write_audio(tmp_path / "a.wav")
    name = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.json", "mmsu": "mmsu.json"}[kind]
    (tmp_path / name).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    benchmark = BENCHMARKS[kind](tmp_path)

    def score(answers: list[str]) -> float | None:
        if kind != "mmsu":
            predictions = {item.question_id: text for item, text in zip(benchmark.items, answers, strict=True)}
            return benchmark.extra_metrics(predictions)["choice_accuracy"]
        pairs = zip(benchmark.items, answers, strict=True)
        return sum(benchmark.is_correct(*pair) for pair in pairs) / len(benchmark.items)

    for index, (item, row) in enumerate(zip(benchmark.items, rows, strict=True)):
        assert (item.answer, item.choices) == (row["answer"], tuple(row["choices"])), index
    letters = [f"{'abcd'[item.choices.index(item.answer)]})" for item in benchmark.items]
    texts = [item.answer for item in benchmark.items]
    assert score(letters if kind == "mmsu" else texts) == 1.0
    decomposed = [unicodedata.normalize("NFD", text).replace("\u2019", "`") for text in texts]
    assert kind == "mmsu" or score(decomposed) == 1.0
    assert score([""] * len(rows)) == 0.0


def test_a_text_is_read_as_it_stands(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "question": "How\u2028many?", "choices": [2, 3.5], "answer": 3.5, "sub-category": "s"},
        {"id": 7, "question": "Who?", "choices": ["It\u2019s me", "you"], "answer": "It's me", "sub-category": "s"},
    ]
    rows = [{**row, "audio_path": "a.wav", "modality": "speech", "more": None} for row in rows]
    write_audio(tmp_path / "a.wav")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "MMAR-meta.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], lines[1], ""]).encode())
    items = Mmar(tmp_path).items
    assert [item.question_id for item in items] == ["7", "7#2"], "questions with one id stay apart"
    assert [item.choices for item in items] == [("2", "3.5"), ("It\u2019s me", "you")]
    assert "How\u2028many?" in items[0].prompt
    assert items[1].answer == "It\u2019s me"


def test_a_question_belongs_to_its_own_domain(exported: Path, tmp_path: Path) -> None:
    place = write_rows("mmar", tmp_path / "mmar", modality="sound")
    lines = (place / "MMAR-meta.jsonl").read_text().splitlines()
    (place / "MMAR-meta.jsonl").write_text("\n".join([lines[0], lines[1].replace('"sound"', '"music"')]))
    scores = tmp_path / "s.json"
    assert main([str(exported / "model"), f"mmar={place}", "--json", str(scores), "--max-new-tokens=2"]) == 0
    by_domain = json.loads(scores.read_text())["mmar"]["by_domain"]
    assert {domain: group["questions"] for domain, group in by_domain.items()} == {"sound": 1, "music": 1}


def test_a_published_benchmark_is_evaluated_from_its_own_files(exported: Path, tmp_path: Path) -> None:
    places = [f"{kind}={write_rows(kind, tmp_path / kind)}" for kind in ("mmau", "mmar")]
    out = ["--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "s.json"), "--max-new-tokens=3"]
    assert main([str(exported / "model"), *places, *out]) == 0
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
        ({"id": None}, "question 1: has no id"),
        ({"choices": "A woman"}, "question 1: has no list of texts at 'choices'"),
        ({"choices": ["A woman", {"text": "A man"}]}, "question 1: has no text at 'choices'"),
    ],
)
def test_an_invalid_benchmark_is_refused(tmp_path: Path, changes: dict, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Mmau(write_rows("mmau", tmp_path, **changes))


def test_a_folder_without_the_questions_is_refused(tmp_path: Path) -> None:
    for kind in BENCHMARKS.values():
        with pytest.raises(UserError, match=r"holds (0 files named|no questions)"):
            kind(tmp_path)
    write_rows("mmar", tmp_path)
    (tmp_path / "MMAR-meta.jsonl").write_text("{broken")
    with pytest.raises(UserError, match="neither a JSON list nor JSON lines"):
        Mmar(tmp_path)


def test_questions_with_withheld_answers_are_answered_and_not_scored(
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = write_rows("mmau", tmp_path / "mmau")
    file = place / "mmau-test-mini.json"
    rows = json.loads(file.read_text())
    del rows[0]["answer"]
    file.write_text(json.dumps(rows))
    common = [str(exported / "model"), f"mmau={place}", "--max-new-tokens=3"]
    assert main([*common, "--json", str(tmp_path / "some.json")]) == 0
    some = json.loads((tmp_path / "some.json").read_text())["mmau"]
    assert (some["questions"], some["unscored"]) == (1, 1)

    file.rename(place / "mmau-test.json")
    (place / "mmau-test.json").write_text(json.dumps([{**row, "answer": ""} for row in rows]))
    for more, fault in (([], "give --predictions"), (["--predictions=p", "--swap-audio"], "leave --swap-audio")):
        assert run_command(main, [*common, *more]) == 2
        assert fault in capsys.readouterr().err.splitlines()[-1]
    out = ["--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "none.json")]
    assert main([*common, *out]) == 0
    none = json.loads((tmp_path / "none.json").read_text())["mmau"]
    assert (none["unscored"], none["clips"], "accuracy" in none) == (2, 1, False)
    assert "2 questions about 1 clips answered, none scored" in capsys.readouterr().out
    assert all(row["model_output"] is not None for row in json.loads((tmp_path / "p.mmau.json").read_text()))


def test_unusable_audio_and_encoders_are_refused(
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, place = exported / "model", write_rows("mmau", tmp_path / "mmau")
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)
    encoders = json.loads((model / "encoders.json").read_text())
    encoders["log_mel"]["options"]["num_mels"] = 32
    (other / "encoders.json").unlink()
    write_text(other / "encoders.json", json.dumps(encoders))

    def last_line(model: Path) -> str:
        assert run_command(main, [str(model), f"mmau={place}", "--max-new-tokens=3"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "does not describe the encoder 'log_mel'" in last_line(other)
    whole = (place / "clip.wav").read_bytes()
    (place / "clip.wav").write_bytes(whole[:44])
    assert "clip.wav: is truncated" in last_line(model)
    (place / "clip.wav").write_bytes(b"no audio")
    assert "clip.wav: is undecodable" in last_line(model)
    (place / "clip.wav").unlink()
    assert "2 of 2 audio files are missing, the first is" in last_line(model)
