"""Word error rates of any set whose questions are transcriptions."""

import jiwer
import numpy as np
import pytest

from pipeline.evaluation.scoring import Prediction, score
from pipeline.evaluation.word_errors import (
    add_word_errors,
    is_transcription,
    plain_words,
    whisper_english_words,
    word_error_scores,
    word_errors,
)


def prediction(answer: str, text: str, clip: str = "c", task: str = "transcription") -> Prediction:
    return Prediction(f"{clip}-{task}", clip, "speech", task, "What is said?", answer, text)


@pytest.mark.parametrize("task", ["transcription", "asr", "ASR_en", "whisper-transcribe", "speech recognition", "STT"])
def test_a_task_is_a_transcription_by_its_name(task: str) -> None:
    assert is_transcription(task)


@pytest.mark.parametrize("task", ["description", "speech", "words", "laser", "subscription"])
def test_other_tasks_are_not(task: str) -> None:
    assert not is_transcription(task)


def test_word_errors_equal_those_of_jiwer() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        reference, hypothesis = (rng.choice(list("abcd"), rng.integers(low, 9)).tolist() for low in (1, 0))
        output = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        assert word_errors(reference, hypothesis) == output.substitutions + output.deletions + output.insertions


@pytest.mark.parametrize("words_of", [plain_words, whisper_english_words])
def test_line_feeds_and_tabs_are_white_space(words_of) -> None:  # type: ignore[no-untyped-def]
    assert words_of("One\ntwo\tthree\r\n four.") == words_of("one two three four")


def test_both_normalisers_are_computed_and_named() -> None:
    scores = word_error_scores([prediction("I won't pay twenty dollars, um", "I will not pay $20")])
    assert scores["wer"] > 0
    assert scores["wer_whisper_english"] == 0


def test_errors_are_counted_over_the_whole_set_with_an_interval_over_clips() -> None:
    right = [prediction("a b c d e f g h i", "a b c d e f g h i", clip=f"right{n}") for n in range(9)]
    scores = word_error_scores([*right, prediction("one", "two", clip="wrong")])
    assert scores["wer"] == pytest.approx(1 / 82), "not the mean of the clips' rates, 0.1"
    low, high = scores["wer_ci95"]
    assert 0 <= low < 1 / 82 < high < 0.1
    assert scores["wer_words"] == 82


def test_words_in_silence_are_errors_and_a_set_without_words_has_no_rate() -> None:
    silence = prediction("...", "thank you", clip="silence")
    assert word_error_scores([silence, prediction("good day", "good day")])["wer"] == 1.0
    assert word_error_scores([silence]) == {"wer_words": 0, "wer_whisper_english_words": 0}
    assert word_error_scores([]) == {}


def test_rates_are_added_to_the_whole_and_by_task() -> None:
    predictions = [
        prediction("a b", "a c"),
        prediction("x", "y", task="dictation"),
        prediction("dog", "cat", task="what"),
    ]
    scores = score(predictions)
    add_word_errors(scores, predictions, ["dictation"])
    assert scores["wer"] == pytest.approx(2 / 3)
    assert scores["by_task"]["transcription"]["wer"] == 0.5
    assert scores["by_task"]["dictation"]["wer"] == 1.0
    assert "wer" not in scores["by_task"]["what"]
