"""An answer means one choice or none; benchmarks are evaluated from their own files; wrong folders are refused."""

import json
from pathlib import Path

import pytest

from pipeline.core.errors import UserError, run_command
from pipeline.evaluate import main
from pipeline.evaluation.benchmarks import BENCHMARKS, Mmar, Mmau
from pipeline.evaluation.benchmarks.multiple_choice import chosen
from tests.helpers.published import VOICES, write_rows, write_text


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
    assert json.loads((tmp_path / "none.json").read_text())["mmau"] == {"unscored": 2, "clips": 1}
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
    assert "clip.wav: is empty" in last_line(model)
    (place / "clip.wav").write_bytes(b"no audio")
    assert "clip.wav: is undecodable" in last_line(model)
    (place / "clip.wav").unlink()
    assert "2 of 2 audio files are missing, the first is" in last_line(model)
