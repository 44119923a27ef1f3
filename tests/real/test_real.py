"""What `make real` computes without its downloads: texts, held-out prompts, tensors, error rates, resumption."""

from __future__ import annotations

import gzip
import io
import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.real import __main__ as real
from tests.real import corpus
from tests.real.report import error_rates, score_predictions, word_errors
from tests.real.whisper import read_variables


def test_texts_without_comments_notes_and_lost_letters(tmp_path: Path) -> None:
    lines = (
        "\ufeff; a comment: no\nhello: Hello...  world.\ndigits/1: uno\nbeep: [a beep]\nlost: il tempo sar? esatto\n"
    )
    listing = tmp_path / "texts.txt.gz"
    listing.write_bytes(gzip.compress(lines.encode()))
    assert corpus.read_texts(listing) == {"hello": "Hello world.", "digits/1": "uno"}


def test_a_prompt_is_held_out_in_every_language_and_so_is_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentence `n % 50` is spoken by several prompts, so that some held-out sentences are also those of other keys."""

    def clips() -> list[corpus.Clip]:
        return [
            corpus.Clip(f"{language}/{n}", Path(f"{n}.wav"), "speech", f"{n}",
                        (("transcription", "Transcribe.", f"{language} {n % 50}"),))
            for language in ("en", "fr") for n in range(200)
        ]  # fmt: skip

    monkeypatch.setattr(corpus, "speech_clips", clips)
    monkeypatch.setattr(corpus, "instrument_clips", list)
    sizes = corpus.write_corpus(tmp_path)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert sizes == {"train": len(train), "test": len(test)} and min(sizes.values()) > 0
    keys = [{row["clip_id"].partition("/")[2] for row in rows} for rows in (train, test)]
    sentences = [{row["questions"][0]["answer"] for row in rows} for rows in (train, test)]
    assert not keys[0] & keys[1] and not sentences[0] & sentences[1]
    assert {f"{language}/{key}" for language in ("en", "fr") for key in keys[1]} == {row["clip_id"] for row in test}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("bd_haus", "bass drum"),
        ("drum_snare_soft", "snare drum"),
        ("elec_hi_snare", "snare drum"),
        ("drum_cowbell", "bell"),
        ("tabla_ke1", "tabla"),
    ],
)
def test_instruments_by_file_name(file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tmp_path / "usr/share/sonic-pi/samples"
    samples.mkdir(parents=True)
    for stem in (file, "misc_burp"):
        soundfile.write(samples / f"{stem}.flac", np.zeros(8000), 8000)
    monkeypatch.setattr(corpus, "fetch_debian_package", lambda package: tmp_path)
    (clip,) = corpus.instrument_clips()
    ((task, question, answer),) = clip.questions
    assert (task, answer) == ("instrument", name) and name in question


def test_variables_of_a_ctranslate2_file() -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    variable = text("w") + struct.pack("<BIIBI", 2, 2, 3, 4, values.nbytes) + values.tobytes()
    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1)
    file = io.BytesIO(head + variable + struct.pack("<I", 1) + text("alias") + text("w"))
    variables = read_variables(file)
    assert variables["w"].tolist() == variables["alias"].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("answer", "errors"),
    [("Press one, now!", 0), ("press two now", 1), ("", 3), ("please press one now now", 2)],
)
def test_word_errors_ignore_case_and_punctuation(answer: str, errors: int) -> None:
    assert word_errors({"answer": "press one now", "prediction": answer}) == errors


def test_error_rates_weigh_words_and_compare_with_swapped_audio() -> None:
    own = [{"clip_id": f"{n}", "answer": "a b c", "prediction": "a b c" if n else "a b"} for n in range(4)]
    swapped = [{**line, "prediction": "x"} for line in own]
    rates = error_rates(own, swapped)
    assert rates["own"][0] == pytest.approx(1 / 12) and rates["swapped"][0] == 1
    assert rates["difference"][0] == pytest.approx(11 / 12) and rates["difference"][1] > 0


def test_scores_by_task_and_language(tmp_path: Path) -> None:
    lines = []
    for audio in ("own", "swapped"):
        for n in range(3):
            common = {"audio": audio, "clip_id": f"fr/{n}", "answer": "un"}
            lines += [
                {**common, "question_id": f"{n}l", "task": "language", "prediction": "", "correct": audio == "own"},
                {**common, "question_id": f"{n}t", "task": "transcription", "prediction": "un", "correct": True},
            ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = score_predictions(path)
    assert scores["language"]["difference"] == [1, 1, 1]
    assert scores["transcription.fr"]["own"][0] == 0


def test_a_finished_stage_is_skipped_and_an_interrupted_one_runs_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def work(name: str) -> None:
        calls.append(name)
        if calls.count("second") == 1 and name == "second":
            raise KeyboardInterrupt

    stages = [real.Stage(name, partial(work, name)) for name in ("first", "second")]
    with pytest.raises(KeyboardInterrupt):
        for stage in stages:
            real.run(tmp_path, stage)
    for stage in stages:
        real.run(tmp_path, stage)
    assert calls == ["first", "second", "second"]
