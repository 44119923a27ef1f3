"""The word error rate covers a whole part of LibriSpeech."""

import json
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.benchmarks import LibriSpeech
from tests.helpers.published import write_audio


def test_words_are_counted_over_the_whole_part(exported: Path, tmp_path: Path) -> None:
    part = tmp_path / "test-clean"
    for name in ("1-2-0000", "1-2-0001"):
        write_audio(part / "1" / "2" / f"{name}.flac")
    (part / "1" / "2" / "1-2.trans.txt").write_text("1-2-0000 HE'S HERE\n1-2-0001 ONE TWO THREE\n")
    speech = LibriSpeech(part)
    assert [item.answer for item in speech.items] == ["HE'S HERE", "ONE TWO THREE"]
    assert speech.is_correct(speech.items[0], " He's — here!")
    assert not speech.is_correct(speech.items[0], "he is here")

    arguments = [f"librispeech={part}", "--json", str(tmp_path / "s.json"), "--max-new-tokens=2"]
    assert main([str(exported / "model"), *arguments]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["librispeech"]
    assert scores["wer"] > 0 and scores["wer_whisper_english"] > 0
    assert scores["by_task"]["test-clean"]["wer_words"] == 5


@pytest.mark.parametrize("apostrophe", ["\u2019", "\u2018", "\u02bc", "`", "\u00b4", "\uff07"])
def test_typography_is_no_error_of_words(tmp_path: Path, apostrophe: str) -> None:
    part = tmp_path / "test-clean"
    write_audio(part / "1" / "2" / "1-2-0000.flac")
    (part / "1" / "2" / "1-2.trans.txt").write_bytes("\ufeff1-2-0000 I DON'T KNOW CAF\u00c9S\r\n\r\n".encode())
    (part / "1" / "2" / "._1-2.trans.txt").write_bytes(b"\0\5\26\7")
    speech = LibriSpeech(part)
    text = f"I\u200b don{apostrophe}t know cafe\u0301s."

    assert speech.is_correct(speech.items[0], text)
    assert not speech.is_correct(speech.items[0], "")


def test_a_line_without_a_transcript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1" / "2").mkdir(parents=True)
    (tmp_path / "1" / "2" / "1-2.trans.txt").write_text("1-2-0000 ONE\n1-2-0001\n")
    with pytest.raises(UserError, match=r"1-2\.trans\.txt:2: has no transcript"):
        LibriSpeech(tmp_path)
