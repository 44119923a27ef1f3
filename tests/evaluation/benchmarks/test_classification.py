"""Classes that an answer names are scored as the publishers score them; layouts are read as published."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.manifests.reader import read_clips
from pipeline.core.class_names import named
from pipeline.core.errors import UserError
from pipeline.evaluation.benchmarks import Benchmark, Dcase2017, Esc50, Fsd50k, Gtzan, VocalSound
from tests.helpers.published import write_audio, write_text


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
    assert [esc.is_correct(baby, text) for text in ("A crying baby.", "a dog and a crying baby", "baby", "")] == [
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
    assert gtzan.is_correct(gtzan.items[0], "It is jazz music")


def test_every_class_that_is_named_counts_and_none_within_another() -> None:
    classes = ("Car", "Car alarm", "Air horn, truck horn", "Police car (siren)")
    for answer, numbers in (
        ("car alarm", {1}),
        ("A car, and a car alarm.", {0, 1}),
        ("air horn, truck horn; police car (siren)", {2, 3}),
        ("a police car", {0}),
        ("cars", set()),
        ("", set()),
    ):
        assert named(answer, classes) == numbers


def test_vocal_sounds_take_their_class_from_the_file_name(tmp_path: Path) -> None:
    names = ["f0003_0_cough.wav", "m0004_1_throatclearing.wav"]
    for name in names:
        write_audio(tmp_path / "audio_16k" / name)
    rows = [{"wav": f"/far/away/{name}", "labels": "/m/0"} for name in names]
    write_text(tmp_path / "datafiles" / "te.json", json.dumps({"data": rows}))
    sounds = VocalSound(tmp_path)
    assert [item.answer for item in sounds.items] == ["cough", "throat clearing"]
    assert sounds.is_correct(sounds.items[1], "They are clearing... throat clearing!")
    write_text(tmp_path / "datafiles" / "te.json", json.dumps(rows))
    with pytest.raises(UserError, match="is no list of recordings"):
        VocalSound(tmp_path)


def test_tags_are_counted_by_class(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_audio(tmp_path / "fsd" / "FSD50K.eval_audio" / f"{name}.wav")
    table = 'fname,labels,mids\na,"Bark,Dog","/m/1,/m/2"\nb,Purr,/m/3\nc,"Dog","/m/2"\n'
    write_text(tmp_path / "fsd" / "FSD50K.ground_truth" / "eval.csv", table)
    fsd = Fsd50k(tmp_path / "fsd")
    answers = {item.question_id: text for item, text in zip(fsd.items, ("dog", "purr, dog", "Dog."), strict=True)}
    assert [fsd.is_correct(item, answers[item.question_id]) for item in fsd.items] == [False, False, True]
    # Bark: never named. Dog: 2 of 2 named, 3 times in all. Purr: 1 of 1. Average precision: Bark 1/3, Dog 2/3, Purr 1.
    assert fsd.extra_metrics(answers) == pytest.approx(
        {
            "f1_micro": 2 * 3 / (4 + 4),
            "f1_macro": (0 + 4 / 5 + 1) / 3,
            "mean_average_precision": (1 / 3 + 2 / 3 + 1) / 3,
        }
    )
    perfect = {item.question_id: item.answer for item in fsd.items}
    assert set(fsd.extra_metrics(perfect).values()) == {1.0}
    one = fsd.items[1].question_id
    assert set(fsd.extra_metrics({one: "Purr"}).values()) == {1.0}, "classes that do not occur have no score"


def test_dcase_tags_are_one_per_line(tmp_path: Path) -> None:
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
    assert dcase.is_correct(dcase.items[0], "a train and a car")
    assert dcase.extra_metrics({dcase.items[1].question_id: "air horn, truck horn"})["f1_micro"] == 1
    write_text(file, "a.wav,0,10,Car\n")
    with pytest.raises(UserError, match="line 1: has 1 columns"):
        Dcase2017(tmp_path)


NAMES = ("clock_tick", "dog", "door_wood_knock", "Hip-Hop", "Air horn, truck horn", "R&B", "Car", "Alarm", "Car alarm")


def write_esc50(root: Path, names: Sequence[str]) -> Path:
    rows = [f'1-{number}-A.wav,1,{number},"{name}"' for number, name in enumerate(names)]
    for number in range(len(names)):
        write_audio(root / "audio" / f"1-{number}-A.wav")
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "esc50.csv").write_bytes("\r\n".join(["\ufefffilename,fold,target,category", *rows, ""]).encode())
    return root


def test_any_spelling_of_a_class_is_the_class(tmp_path: Path) -> None:
    esc = Esc50(write_esc50(tmp_path, NAMES))
    for item, name in zip(esc.items, NAMES, strict=True):
        plain = name.replace("_", " ").replace("-", " ").replace(",", "")
        for text in (name, plain, plain.upper(), plain.replace(" ", "-"), plain.replace(" ", "_"), f"It is {plain}!"):
            assert esc.is_correct(item, text), (name, text)
        assert not esc.is_correct(item, "")
    for text in ("hip hop", "hiphop", "Hip\u2010hop", "\uff28ip\u200bHop"):
        assert esc.is_correct(esc.items[3], text)
    assert esc.is_correct(esc.items[5], "R & B")


def test_letters_are_not_offered_for_classes(tmp_path: Path) -> None:
    esc = Esc50(write_esc50(tmp_path, ["cat", "dog", "hen"]))
    for item, letter in zip(esc.items, "ABC", strict=True):
        for text in (letter, f"({letter.lower()})", f"Answer: {letter}", f"{letter}. whatever"):
            assert not esc.is_correct(item, text)


def test_answers_that_preparation_trains_on_are_right(tmp_path: Path) -> None:
    root = write_esc50(tmp_path / "esc", ["clock_tick", "dog", "door_wood_knock"])
    table = {"question": "Which sound is this?"}
    config = PrepareConfig(
        manifest=str(root / "meta" / "esc50.csv"), output="unused", audio_root=str(root / "audio"), table=table
    )
    trained = [clip.questions[0].answer for clip in read_clips(config)]
    esc = Esc50(root)
    assert len(trained) == 3
    assert all(esc.is_correct(*pair) for pair in zip(esc.items, trained, strict=True))


def test_tags_of_a_list_do_not_run_together(tmp_path: Path) -> None:
    for number in range(4):
        write_audio(tmp_path / "FSD50K.eval_audio" / f"{number}.wav")
    labels = ("Car,Alarm", "Car_alarm", "Electric_guitar,Guitar,Music", "Chink_and_clink")
    rows = [f'{number},"{names}",m' for number, names in enumerate(labels)]
    write_text(tmp_path / "FSD50K.ground_truth" / "eval.csv", "\n".join(["fname,labels,mids", *rows]))
    fsd = Fsd50k(tmp_path)
    for item, names in zip(fsd.items, labels, strict=True):
        assert fsd.is_correct(item, names) and fsd.is_correct(item, item.answer)
        assert not fsd.is_correct(item, "")
    perfect = {item.question_id: item.answer for item in fsd.items}
    assert set(fsd.extra_metrics(perfect).values()) == {1.0}


def test_a_file_with_two_classes_is_refused(tmp_path: Path) -> None:
    root = write_esc50(tmp_path, ["dog", "cat"])
    with (root / "meta" / "esc50.csv").open("a") as file:
        file.write("1-0-A.wav,1,1,cat\r\n")
    with pytest.raises(UserError, match=r"lists audio/1-0-A\.wav twice, with different classes"):
        Esc50(root)
    with (root / "meta" / "esc50.csv").open("a") as file:
        file.write("1-0-A.wav,1,1,cat,dog,bird\r\n")
    with pytest.raises(UserError, match=r"esc50\.csv:5: has 6 fields, the header has 4"):
        Esc50(root)


def test_hidden_files_are_no_music(tmp_path: Path) -> None:
    write_audio(tmp_path / "genres" / "hiphop" / "hiphop.00000.wav")
    (tmp_path / "genres" / "hiphop" / "._hiphop.00000.wav").write_bytes(b"\0\5\26\7")
    assert [item.question_id for item in Gtzan(tmp_path).items] == ["hiphop/hiphop.00000.wav"]


LABELS = ("Air horn, truck horn", "Car", "Police car (siren)", "Car passing by", "Reversing beeps")


def write_layout(kind: type[Benchmark], root: Path) -> Benchmark:
    """Writes one file for each of LABELS, where the layout holds any names; else for its own classes."""
    if kind is Gtzan:
        for genre in ("hiphop", "jazz"):
            write_audio(root / "genres" / genre / f"{genre}.00000.wav")
    elif kind is VocalSound:
        names = ["m1_0_throatclearing.wav", "m1_0_cough.wav"]
        for name in names:
            write_audio(root / "audio_44k" / name)
        write_text(root / "datafiles" / "te.json", json.dumps({"data": [{"wav": name} for name in names]}))
    else:
        lines = [f"{number}.wav\t0\t1\t{label}" for number, label in enumerate(LABELS)]
        for number in range(len(LABELS)):
            write_audio(root / "evaluation_set_formatted_audio_segments" / f"Y{number}.wav")
        text = "\ufeff" + "\r\n".join([*lines, "0.wav\t0\t1\tCar", "0.wav\t1\t2\tCar", "", ""])
        (root / "groundtruth_weak_label_evaluation_set.csv").write_bytes(text.encode())
    return kind(root)


@pytest.mark.parametrize("kind", [Gtzan, VocalSound, Dcase2017])
def test_a_reader_who_knows_every_class_is_right_and_a_silent_one_wrong(tmp_path: Path, kind: type[Benchmark]) -> None:
    benchmark = write_layout(kind, tmp_path)
    assert len(benchmark.items) == (len(LABELS) if kind is Dcase2017 else 2)
    for item in benchmark.items:
        for text in (item.answer, item.answer.upper(), item.answer.replace(" ", "_"), f"I hear {item.answer}."):
            assert benchmark.is_correct(item, text), text
        assert not benchmark.is_correct(item, "")
