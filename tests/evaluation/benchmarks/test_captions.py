"""Captions are scored by CIDEr, and written for the tools that compute the other metrics."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.benchmarks import AudioCaps, Clotho
from tests.helpers.published import write_audio, write_text


def write_clotho(root: Path, captions: dict[str, list[str]]) -> Path:
    for name in captions:
        write_audio(root / "evaluation" / name)
    with (root / "clotho_captions_evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *(f"caption_{n}" for n in range(1, 6))])
        writer.writerows([name, *given] for name, given in captions.items())
    return root


def test_captions_are_scored_by_cider(tmp_path: Path) -> None:
    """A score calculated by hand: one word, one caption in each of two files, that no other file shares.

    tf-idf of the word is log 2 in caption and answer, so the 1-grams agree fully (1), and there are no longer n-grams
    (0): 10 * (1 + 0 + 0 + 0) / 4. Of an answer of two such words beside the one the cosine is 1 / sqrt(2), and the
    lengths, which the reference implementation counts in pairs of words, differ by one: exp(-1 / (2 * 6^2)).
    """
    clotho = Clotho(write_clotho(tmp_path, {"a.wav": ["Rain!"], "b.wav": ["dog"]}))
    assert clotho.question_scores({"a.wav": "rain", "b.wav": "DOG."}) == {
        "cider": pytest.approx({"a.wav": 2.5, "b.wav": 2.5})
    }
    mixed = clotho.question_scores({"a.wav": "rain dog", "b.wav": ""})["cider"]
    assert mixed == pytest.approx({"a.wav": 2.5 / math.sqrt(2) * math.exp(-1 / 72), "b.wav": 0})
    assert clotho.is_correct(clotho.items[0], "rain.") and not clotho.is_correct(clotho.items[0], "a rain")
    assert set(clotho.extra_metrics({"a.wav": "rain"})) == {"spice", "spider", "fense"}


def test_captions_are_evaluated_and_written_for_the_official_tools(
    exported: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "pal")
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
    assert main([str(exported / "model"), f"clotho={clotho}", f"audiocaps={caps}", *out]) == 0
    assert caplog.text.count("spice, spider and fense need Java") == 2
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["clotho"]["cider"] >= 0 and scores["clotho"]["cider_ci95"][0] <= scores["clotho"]["cider"]
    assert scores["clotho"]["spice"] is None
    with (tmp_path / "p.clotho.csv").open(newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["a, b.wav", "c.wav"]
    assert (tmp_path / "p.audiocaps.csv").read_text().startswith("file_name,caption_predicted\n")


def test_captions_need_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"clotho: needs pycocoevalcap; pip install 'pal-pipeline\[captions\]'"):
        Clotho(tmp_path)


def test_of_what_a_download_leaves_the_audio_is_taken(tmp_path: Path) -> None:
    ids = ["aaaaaaaaaaa", "-b_bbbbbbbb", "Ycccccccccc", "cccccccccck"]
    for name in ids:
        write_audio(tmp_path / "audio" / f"{name}.wav")
        for sidecar in (".info.json", ".description", ".m4a", ".wav.part"):
            (tmp_path / "audio" / f"{name}{sidecar}").write_text("{}")
        (tmp_path / "audio" / f"._{name}.wav").write_bytes(b"\0\5\26\7")
    (tmp_path / "audio" / "cccccccccck.wav").rename(tmp_path / "audio" / "Ycccccccccck.wav")
    lines = ["\ufeffaudiocap_id,youtube_id,start_time,caption,more", *(f'{n},{n},0,"a, {n}",x' for n in ids), ""]
    (tmp_path / "test.csv").write_bytes("\r\n".join(lines).encode())
    names = [item.audio.name for item in AudioCaps(tmp_path).items]
    assert names == ["aaaaaaaaaaa.wav", "-b_bbbbbbbb.wav", "Ycccccccccc.wav", "Ycccccccccck.wav"]


@pytest.mark.parametrize(
    ("kind", "file", "header", "line", "fault"),
    [
        (AudioCaps, "test.csv", "audiocap_id,youtube_id,start_time,caption", "1,a,0,a dog, barking", "has 5 fields"),
        (AudioCaps, "test.csv", "audiocap_id,youtube_id,start_time,caption", "1,a", "has no caption"),
        (AudioCaps, "test.csv", "audiocap_id,youtube_id,start_time,caption", "1,,0,a dog", "has no youtube_id"),
        (AudioCaps, "test.csv", "audiocap_id,youtube_id,start_time,caption", '1,a,0,"a "dog', "is no CSV"),
        (Clotho, "clotho_captions_evaluation.csv", "file_name,caption_1", "a.wav,a dog, barking", "has 3 fields"),
        (Clotho, "clotho_captions_evaluation.csv", "file_name,caption_1", "a.wav, ", "has no caption"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, kind: type, file: str, header: str, line: str, fault: str) -> None:
    good = header.replace("caption_1", "a bird").replace("caption", "a bird")
    (tmp_path / file).write_text(f"{header}\n{good}\n{line}\n")
    with pytest.raises(UserError, match=rf"{file}:3: {fault}"):
        kind(tmp_path)


def test_typography_does_not_decide_about_captions(tmp_path: Path) -> None:
    clotho = Clotho(write_clotho(tmp_path, {"a.wav": ["A dog\u2019s bark"], "b.wav": ["cafe\u0301 noise"]}))
    texts = {"a.wav": "a dog`s bark", "b.wav": "caf\u00e9\u200b noise"}
    assert all(clotho.is_correct(item, texts[item.question_id]) for item in clotho.items)
    references = {item.question_id: item.answer for item in clotho.items}
    assert clotho.question_scores(texts) == clotho.question_scores(references)
    assert not any(clotho.is_correct(item, "") for item in clotho.items)


@pytest.mark.parametrize(
    ("listed", "stored"), [("cafe\u0301.wav", "caf\u00e9.wav"), ("caf\u00e9.wav", "cafe\u0301.wav")]
)
def test_a_name_is_found_in_either_unicode_form(tmp_path: Path, listed: str, stored: str) -> None:
    write_clotho(tmp_path, {stored: ["a dog"]})
    file = tmp_path / "clotho_captions_evaluation.csv"
    file.write_text(file.read_text().replace(stored, listed))
    assert [item.audio.name for item in Clotho(tmp_path).items] == [stored]
