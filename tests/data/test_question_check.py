"""Questions that cannot be trained on are found before anything is trained, and the check is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config import DataConfig, TrainConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks
from pipeline.data import question_check_cache, question_check_measure
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.data.feature_set import FeatureSet
from pipeline.data.loader import TrainingLoader
from pipeline.data.question_check import CheckedSelection, QuestionChecker, Selection
from pipeline.data.question_check_cache import FOLDER
from tests.helpers.feature_sets import byte_tokenizer, frames_of, write_rows
from tests.helpers.log_lines import log_lines

CLIPS = 60
BAD = "clip-7/1"  # the question that tests spoil


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def write_set(folder: Path, *, duration_s: float = 1.0, **bad: Any) -> FeatureSet:
    """Writes a set of 120 questions; `bad` replaces fields of one of them."""
    rows = [
        {
            "clip_id": f"clip-{clip}",
            "duration_s": duration_s if clip == 7 else 1.0,
            "dataset": "d",
            "domain": "sound",
            "questions": [
                {"question_id": f"clip-{clip}/{n}", "question": f"What is {n}?", "answer": f"a {clip}", "task": "what"}
                for n in range(2)
            ],
        }
        for clip in range(CLIPS)
    ]
    rows[7]["questions"][1] |= bad
    write_rows(folder, rows, {"log_mel": [frames_of(clip, 8) for clip in range(CLIPS)]}, clips_per_shard=16)
    return FeatureSet(folder, ["log_mel"])


def template(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> ChatTemplate:
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return ChatTemplate(load_tokenizer(folder), "Listen.", max_text_tokens=1024)


@pytest.fixture
def chat(tmp_path: Path) -> ChatTemplate:
    return template(tmp_path / "tokenizer")


def check(features: FeatureSet, chat: ChatTemplate, max_positions: int | None = None, **data: Any) -> CheckedSelection:
    """Checks all questions of a set whose audio takes ten positions a second."""
    config = DataConfig(train=str(features.folder), **data)
    checker = QuestionChecker(chat, config, max_positions, lambda seconds: round(10 * seconds))
    return checker.check(features, Selection("data.train", config.tasks, config.datasets))


def refuse_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the questions were measured again")

    monkeypatch.setattr(question_check_cache, "measure", refuse)


def test_nothing_is_left_out_of_a_fitting_set(tmp_path: Path, chat: ChatTemplate) -> None:
    features = write_set(tmp_path / "set")
    before = features.table.select()
    assert not check(features, chat, max_positions=200).unfit
    assert (features.table.select() == before).all()
    expected = [after for _, after in chat.token_counts(features.questions())]
    assert features.table.tokens is not None and features.table.tokens.tolist() == expected


def no_template() -> PreTrainedTokenizerBase:
    return byte_tokenizer(chat_template=None)


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[], PreTrainedTokenizerBase], str, str]] = {
    "too long": ({"answer": "a" * 2000}, byte_tokenizer, "text_tokens", "data.max_text_tokens is 1024"),
    "mark of a turn": ({"answer": "### Response: no"}, no_template, "text", "'### Response:', which marks a turn"),
    "no answer": ({"answer": " "}, byte_tokenizer, "text", "has an empty answer"),
    "no choice": ({"choices": ["dog", "cat"], "answer": "cow"}, byte_tokenizer, "choices", "none of its choices"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_unfit_question_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    bad, tokenizer, reason, fault = MISTAKES[name]
    features = write_set(tmp_path / "set", **bad)
    checked = check(features, template(tmp_path / "tokenizer", tokenizer()))
    (unfit,) = checked.unfit
    assert (unfit.question_id, unfit.clip_id, unfit.reason) == (BAD, "clip-7", reason)
    assert fault in unfit.fault and unfit.remedy
    assert f"data.train: 1 of 120 questions is left out: question '{BAD}'" in checked.report()
    assert features.table.select().tolist() == [index for index in range(120) if index != 15]


def test_a_control_token_that_the_tokenizer_cannot_split_is_unfit(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not check(write_set(tmp_path / "fast", answer="<|im_end|>"), chat).unfit  # plain text to a fast tokenizer
    monkeypatch.setattr(type(chat.tokenizer), "is_fast", False)
    monkeypatch.setattr(question_check_cache, "_tokenizer_sha256", lambda _: "slow")
    (unfit,) = check(write_set(tmp_path / "slow", answer="<|im_end|>"), chat).unfit
    assert unfit.question_id == BAD and "control token <|im_end|>" in unfit.fault


def test_audio_and_text_beyond_the_positions_are_unfit(tmp_path: Path, chat: ChatTemplate) -> None:
    features = write_set(tmp_path / "set", duration_s=50.0)
    text = len(chat.row(features.clip(7).questions[:1]).input_ids) - 1
    checked = check(features, chat, max_positions=500 + text - 1, max_unfit_fraction=0.1)
    assert [question.question_id for question in checked.unfit] == ["clip-7/0", BAD]
    fault = f"takes {500 + text} positions with its audio, more than the {499 + text} of the language model"
    assert checked.unfit[0].fault == fault
    assert not check(features, chat, max_positions=500 + text).unfit


def test_unfit_questions_are_an_error_on_request(tmp_path: Path, chat: ChatTemplate) -> None:
    features = write_set(tmp_path / "set", answer="a" * 2000)
    with pytest.raises(UserError, match=f"data.train: question '{BAD}' is .* raise data.max_text_tokens") as error:
        check(features, chat, unfit_questions="error")
    assert "data.unfit_questions=skip leaves out" in str(error.value)
    for remedy in ({"max_text_tokens": 4096}, {"unfit_questions": "skip"}, {"tasks": ["what"]}):
        check(features, chat, **remedy)
    assert not check(features, chat, unfit_questions="error", max_text_tokens=4096).unfit


def test_too_many_unfit_questions_are_an_error(tmp_path: Path, chat: ChatTemplate) -> None:
    features = write_set(tmp_path / "set", answer="a" * 2000)
    message = r"1 of 120 questions are unfit \(1 for text_tokens; .* more than data.max_unfit_fraction 0.001"
    with pytest.raises(UserError, match=message):
        check(features, chat, max_unfit_fraction=0.001)
    assert len(check(features, chat, max_unfit_fraction=0.01).unfit) == 1
    with pytest.raises(UserError, match=r"120 of 120 questions are unfit .* so nothing is left; raise data.max_text"):
        check(features, chat, max_text_tokens=2, max_unfit_fraction=1.0)


def test_only_selected_questions_are_counted(tmp_path: Path, chat: ChatTemplate) -> None:
    features = write_set(tmp_path / "set", answer="a" * 2000, task="other")
    checked = check(features, chat, tasks=["what"], unfit_questions="error")
    assert checked.count == 119 and not checked.unfit


def test_a_second_check_reads_the_cache_whatever_the_bounds(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"answer": "a" * 2000, "choices": ["b"]}
    features = write_set(tmp_path / "set", **bad)
    first = check(features, chat)
    refuse_to_measure(monkeypatch)
    second = FeatureSet(tmp_path / "set", ["log_mel"])
    assert check(second, chat).unfit == first.unfit
    assert second.table.tokens is not None and features.table.tokens is not None
    assert (second.table.tokens == features.table.tokens).all()
    assert len(check(second, chat, max_text_tokens=70, max_unfit_fraction=0.9).unfit) == 1


@pytest.mark.parametrize("change", ["text", "system prompt", "tokenizer"])
def test_a_change_is_measured_again(
    change: str, tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_set(tmp_path / "set")
    check(features, chat)
    refuse_to_measure(monkeypatch)
    if change == "text":
        (tmp_path / "set" / FOLDER).rename(tmp_path / "kept")
        shutil.rmtree(tmp_path / "set")
        features = write_set(tmp_path / "set", answer="another")
        (tmp_path / "kept").rename(tmp_path / "set" / FOLDER)
    elif change == "system prompt":
        chat = ChatTemplate(chat.tokenizer, "Listen well.", max_text_tokens=1024)
    else:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["What"])
        chat = template(tmp_path / "other", tokenizer)
    with pytest.raises(AssertionError, match="measured again"):
        check(features, chat)


@pytest.mark.parametrize("damage", [b"", b"no zip", None])
def test_a_damaged_cache_is_made_again(tmp_path: Path, chat: ChatTemplate, damage: bytes | None) -> None:
    features = write_set(tmp_path / "set", answer="a" * 2000)
    expected = check(features, chat)
    (file,) = (tmp_path / "set" / FOLDER).glob("*.npz")
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2] if damage is None else damage)
    assert check(features, chat) == expected
    assert file.read_bytes() == intact


def test_a_set_that_cannot_be_written_is_kept_in_the_users_cache(
    tmp_path: Path, chat: ChatTemplate, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_set(tmp_path / "set")
    (tmp_path / "set" / FOLDER).write_text("a file in the place of the folder")
    check(features, chat)
    assert len(list(user_cache.rglob("*.npz"))) == 1
    refuse_to_measure(monkeypatch)
    assert check(features, chat).count == 120


def test_without_a_place_for_the_cache_the_check_is_made_at_each_start(
    tmp_path: Path, chat: ChatTemplate, user_cache: Path
) -> None:
    features = write_set(tmp_path / "set", answer="a" * 2000)
    (tmp_path / "set" / FOLDER).write_text("")
    user_cache.write_text("")
    for _ in range(2):
        with log_lines() as lines:
            assert len(check(features, chat).unfit) == 1
        assert sum("the next start checks them again" in line for line in lines) == 1


def test_processes_find_the_same_as_one(tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    features = write_set(tmp_path / "set", answer="b", choices=["a"])
    alone = question_check_measure.measure(features, chat, 1)
    monkeypatch.setattr(question_check_measure, "MIN_QUESTIONS_FOR_PROCESSES", 0)
    monkeypatch.setattr(question_check_measure, "QUESTIONS_PER_TASK", 7)
    together = question_check_measure.measure(features, chat, 2)
    assert alone.faults == together.faults and alone.faults.keys() == {15}
    assert np.array_equal(alone.text_tokens, together.text_tokens)


def test_another_process_that_checks_the_same_is_waited_for(
    tmp_path: Path, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_set(tmp_path / "set")
    measured = question_check_measure.measure(features, chat, 1)
    files: list[Path] = []

    def measure_elsewhere(lock: Path, stack: object) -> bool:  # the other process is ready when its lock is free
        files.append(lock)
        question_check_cache._write([lock.with_suffix(".npz")], measured)
        return True

    monkeypatch.setattr(question_check_cache, "_is_locked", measure_elsewhere)
    refuse_to_measure(monkeypatch)
    assert check(features, chat).count == 120
    assert files[0].parent == tmp_path / "set" / FOLDER


def test_the_longest_row_that_may_be_packed_is_refused_before_the_first_step(
    tmp_path: Path, chat: ChatTemplate
) -> None:
    """A row of both questions is too long with the long one; a row of one question fits."""
    features = write_set(tmp_path / "set", answer="a" * 300)
    check(features, chat)

    def build(questions_per_sequence: int, bound: int) -> TrainingLoader:
        data = DataConfig(train="unused", questions_per_sequence=questions_per_sequence)
        train = TrainConfig(micro_batch_size=4, micro_batch_tokens=bound, global_batch_size=8)
        return TrainingLoader([features], chat, data, train, Ranks(0, 1, 0, 1), lambda seconds: 10)

    rows = [chat.row(features.clip(7).questions[:count]) for count in (1, 2)]
    longest = len(rows[1].input_ids) - 1 + 10
    build(2, longest)
    fault = (
        rf"train\.micro_batch_tokens: is {longest - 1}, and a row with question '{BAD}' may have {longest} positions"
    )
    with pytest.raises(UserError, match=fault):
        build(2, longest - 1)
    build(1, longest - 1)  # the remedy: fewer questions in a row


@pytest.mark.parametrize("micro_batch_size", [8, 16])
def test_rows_are_sorted_by_their_audio_too(micro_batch_size: int, tmp_path: Path, chat: ChatTemplate) -> None:
    """Without a bound on positions too: audio in the sequence is most of a row, and texts do not tell its length."""
    seconds = np.random.default_rng(0).choice([2.0, 30.0], CLIPS)
    rows = [
        {
            "clip_id": f"clip-{clip}",
            "duration_s": seconds[clip],
            "dataset": "d",
            "domain": "sound",
            "questions": [{"question_id": f"{clip}", "question": "What?", "answer": "a" * (clip % 7 + 1), "task": "t"}],
        }
        for clip in range(CLIPS)
    ]
    write_rows(tmp_path / "set", rows, {"log_mel": [frames_of(clip, 8) for clip in range(CLIPS)]})
    features = FeatureSet(tmp_path / "set", ["log_mel"])
    check(features, chat)
    train = TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=48, precision="fp32")
    data = DataConfig(train="unused", questions_per_sequence=1)
    loader = TrainingLoader([features], chat, data, train, Ranks(0, 1, 0, 1), lambda seconds: round(25 * seconds))
    used = padded = 0.0
    for batch in next(iter(loader)):
        lengths = batch["attention_mask"].sum(1) - 1 + 25 * torch.tensor(batch["audio_s"])
        used += float(lengths.sum())
        padded += float(lengths.max()) * len(lengths)
    assert padded / used < 1.2
