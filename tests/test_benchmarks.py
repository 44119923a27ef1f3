"""Verdicts on awkward answers, as the official scorers give them (compared with them on 14,000 generated answers), and
as a reader would; layouts as published; folders that cannot be."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from corpora import tone
from test_ask import folder  # noqa: F401 (a fixture)

from pipeline.benchmarks import (
    BENCHMARKS,
    AudioCaps,
    Clotho,
    Dcase2017,
    Esc50,
    Fsd50k,
    Gtzan,
    LibriSpeech,
    Mmar,
    Mmau,
    Mmsu,
    VocalSound,
)
from pipeline.benchmarks.multiple_choice import chosen, named
from pipeline.benchmarks.string_match import string_match
from pipeline.errors import UserError, run_command
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
        ({"id": None}, "question 1: has no id"),
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


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_every_class_that_is_named_counts_and_none_within_another() -> None:
    classes = ("Car", "Car alarm", "Air horn, truck horn", "Police car (siren)")
    for said, numbers in (
        ("car alarm", {1}),
        ("A car, and a car alarm.", {0, 1}),
        ("air horn, truck horn; police car (siren)", {2, 3}),
        ("a police car", {0}),
        ("cars", set()),
        ("", set()),
    ):
        assert named(said, classes) == numbers


def test_vocal_sounds_take_their_class_from_the_file_name(tmp_path: Path) -> None:
    names = ["f0003_0_cough.wav", "m0004_1_throatclearing.wav"]
    for name in names:
        write_audio(tmp_path / "audio_16k" / name)
    rows = [{"wav": f"/far/away/{name}", "labels": "/m/0"} for name in names]
    write_text(tmp_path / "datafiles" / "te.json", json.dumps({"data": rows}))
    sounds = VocalSound(tmp_path)
    assert [item.answer for item in sounds.items] == ["cough", "throat clearing"]
    assert sounds.correct(sounds.items[1], "They are clearing... throat clearing!")
    write_text(tmp_path / "datafiles" / "te.json", json.dumps(rows))
    with pytest.raises(UserError, match="is no list of recordings"):
        VocalSound(tmp_path)


def test_tags_are_counted_by_class(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_audio(tmp_path / "fsd" / "FSD50K.eval_audio" / f"{name}.wav")
    table = 'fname,labels,mids\na,"Bark,Dog","/m/1,/m/2"\nb,Purr,/m/3\nc,"Dog","/m/2"\n'
    write_text(tmp_path / "fsd" / "FSD50K.ground_truth" / "eval.csv", table)
    fsd = Fsd50k(tmp_path / "fsd")
    said = {item.question_id: text for item, text in zip(fsd.items, ("dog", "purr, dog", "Dog."), strict=True)}
    assert [fsd.correct(item, said[item.question_id]) for item in fsd.items] == [False, False, True]
    # Bark: never named. Dog: 2 of 2 found, 3 named. Purr: 1 of 1. Average precision: Bark 1/3, Dog 2/3, Purr 1.
    assert fsd.further(said) == pytest.approx(
        {
            "f1_micro": 2 * 3 / (4 + 4),
            "f1_macro": (0 + 4 / 5 + 1) / 3,
            "mean_average_precision": (1 / 3 + 2 / 3 + 1) / 3,
        }
    )
    perfect = {item.question_id: item.answer for item in fsd.items}
    assert set(fsd.further(perfect).values()) == {1.0}
    one = fsd.items[1].question_id
    assert set(fsd.further({one: "Purr"}).values()) == {1.0}, "classes that do not occur have no score"


def test_dcase_tags_stand_in_lines_of_their_own(tmp_path: Path) -> None:
    for name in ("Y-id_30.000_40.000.wav", "Yother_0.000_10.000.wav"):
        write_audio(tmp_path / "evaluation_set_formatted_audio_segments" / name)
    lines = [
        "-id_30.000_40.000.wav\t30.000\t40.000\tCar",
        "other_0.000_10.000.wav\t0.000\t10.000\tAir horn, truck horn",
        "-id_30.000_40.000.wav\t30.000\t40.000\tTrain",
    ]
    file = tmp_path / "groundtruth_weak_label_evaluation_set.csv"
    write_text(file, "\n".join(lines) + "\n")
    dcase = Dcase2017(tmp_path)
    assert [item.row["labels"] for item in dcase.items] == [["Car", "Train"], ["Air horn, truck horn"]]
    assert dcase.correct(dcase.items[0], "a train and a car")
    assert dcase.further({dcase.items[1].question_id: "air horn, truck horn"})["f1_micro"] == 1
    write_text(file, "a.wav,0,10,Car\n")
    with pytest.raises(UserError, match="line 1: has 1 columns"):
        Dcase2017(tmp_path)


def write_clotho(root: Path, captions: dict[str, list[str]]) -> Path:
    for name in captions:
        write_audio(root / "evaluation" / name)
    with (root / "clotho_captions_evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *(f"caption_{n}" for n in range(1, 6))])
        writer.writerows([name, *given] for name, given in captions.items())
    return root


def test_captions_are_marked_by_cider(tmp_path: Path) -> None:
    """A hand-calculated mark: one word, one caption in each of two files, that no other file shares.

    tf-idf of the word is log 2 in caption and answer, so the 1-grams agree fully (1), and there are no longer n-grams
    (0): 10 * (1 + 0 + 0 + 0) / 4. Of an answer of two such words beside the one the cosine is 1 / sqrt(2), and the
    lengths, which the reference implementation counts in pairs of words, differ by one: exp(-1 / (2 * 6^2)).
    """
    clotho = Clotho(write_clotho(tmp_path, {"a.wav": ["Rain!"], "b.wav": ["dog"]}))
    assert clotho.marks({"a.wav": "rain", "b.wav": "DOG."}) == {"cider": pytest.approx({"a.wav": 2.5, "b.wav": 2.5})}
    mixed = clotho.marks({"a.wav": "rain dog", "b.wav": ""})["cider"]
    assert mixed == pytest.approx({"a.wav": 2.5 / math.sqrt(2) * math.exp(-1 / 72), "b.wav": 0})
    assert clotho.correct(clotho.items[0], "rain.") and not clotho.correct(clotho.items[0], "a rain")
    assert set(clotho.further({"a.wav": "rain"})) == {"spice", "spider", "fense"}


def test_captions_are_evaluated_and_written_for_the_official_tools(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clotho = write_clotho(tmp_path / "clotho", {"a, b.wav": ["a dog", "dogs bark"], "c.wav": ["rain"]})
    caps = tmp_path / "audiocaps"
    ids = ["Y1234567890", "-abcdefghi_"]
    write_audio(caps / "audio" / f"{ids[0]}.wav")
    write_audio(caps / "audio" / f"Y{ids[1]}_30_40.wav")
    lines = [f"{n},{clip},30,caption {n}" for n, clip in enumerate([*ids, *ids])]
    write_text(caps / "test.csv", "\n".join(["audiocap_id,youtube_id,start_time,caption", *lines]) + "\n")
    assert [item.row["captions"] for item in AudioCaps(caps).items] == [
        ["caption 0", "caption 2"],
        ["caption 1", "caption 3"],
    ]
    out = ["--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "s.json"), "--max-new-tokens=3"]
    assert main([str(folder / "model"), f"clotho={clotho}", f"audiocaps={caps}", *out]) == 0
    assert capsys.readouterr().err.count("spice, spider and fense need Java") == 2
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["clotho"]["cider"] >= 0 and scores["clotho"]["cider_ci95"][0] <= scores["clotho"]["cider"]
    assert scores["clotho"]["spice"] is None
    with (tmp_path / "p.clotho.csv").open(newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["a, b.wav", "c.wav"]
    assert (tmp_path / "p.audiocaps.csv").read_text().startswith("file_name,caption_predicted\n")


def test_captions_without_their_library_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"clotho: needs pycocoevalcap; pip install 'pal-pipeline\[captions\]'"):
        Clotho(tmp_path)


def test_questions_whose_answers_are_kept_back_are_answered_and_not_scored(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = write_rows("mmau", tmp_path / "mmau")
    file = place / "mmau-test-mini.json"
    rows = json.loads(file.read_text())
    del rows[0]["answer"]
    file.write_text(json.dumps(rows))
    common = [str(folder / "model"), f"mmau={place}", "--max-new-tokens=3"]
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


def test_audio_and_encoders_that_cannot_be_are_one_line(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, place = folder / "model", write_rows("mmau", tmp_path / "mmau")
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

    assert "does not tell of the encoder 'log_mel'" in last_line(other)
    whole = (place / "clip.wav").read_bytes()
    (place / "clip.wav").write_bytes(whole[:44])
    assert "clip.wav: is empty" in last_line(model)
    (place / "clip.wav").write_bytes(b"no audio")
    assert "clip.wav: is undecodable" in last_line(model)
    (place / "clip.wav").unlink()
    assert "2 of 2 audio files are missing, the first is" in last_line(model)
