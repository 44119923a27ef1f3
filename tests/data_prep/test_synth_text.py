"""The corpus of text: every answer follows from its description, and held-out wordings are new but of known words."""

import json
import re
from pathlib import Path

import pytest

from data_prep.synth import main
from data_prep.synth.corpus import plan_corpus
from data_prep.synth.descriptions import (
    DESCRIPTIONS,
    HELD_OUT_DESCRIPTIONS,
    HELD_OUT_QUESTIONS,
    MORE_QUESTIONS,
    NAMES,
)
from data_prep.synth.questions import WORDINGS
from data_prep.synth.text import plan_text
from pipeline.core.errors import UserError


@pytest.fixture(scope="module")
def planned():
    return plan_text(1200, seed=0)


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts_in(text: str) -> dict[str, str]:
    """Returns the facts of a description by their names; syllables between the first and the last under `then`."""
    name = rf"\b({'|'.join({*NAMES.values(), 'then'})})"
    parts = re.split(r",? and |, |\. ", text.rstrip("."))
    matches = [match.groups() for part in parts if (match := re.search(rf"{name} ?([A-Z]\w*|(?<= ).+)$", part))]
    return {name: answer.lower() for name, answer in matches}


def transcript(facts: dict[str, str]) -> str:
    syllables = [facts[name] for name in ("first", "then", "last") if name in facts]
    return " ".join(syllables[:1] if facts["number"] == "one" else syllables)


def test_every_answer_follows_from_the_description(planned):
    for clip in planned:
        facts = facts_in(clip.text)
        for question in clip.questions:
            assert question["system"] == clip.text
            is_transcript = question["task"] == "speech.transcribe"
            answer = transcript(facts) if is_transcript else facts[NAMES[question["task"]]]
            assert question["answer"] == answer, question


def test_a_name_stands_for_one_fact_of_a_description(planned):
    for clip in planned:
        tasks = {question["task"] for question in clip.questions}
        assert len({NAMES.get(task, task) for task in tasks}) == len(tasks)


def test_all_tasks_of_audio_are_asked_in_both_parts(planned):
    for held_out in (False, True):
        tasks = {question["task"] for clip in planned if clip.held_out == held_out for question in clip.questions}
        assert tasks == WORDINGS.keys()


def test_held_out_wordings_are_new_and_made_of_known_words(planned):
    def words(held_out):
        clips = [clip for clip in planned if clip.held_out == held_out]
        texts = [clip.text for clip in clips] + [q["question"] for clip in clips for q in clip.questions]
        return set(re.findall(r"\w+", " ".join(texts).lower()))

    assert words(True) <= words(False)
    for task, wordings in HELD_OUT_QUESTIONS.items():
        assert not set(wordings) & {*WORDINGS[task], *MORE_QUESTIONS[task]}
    assert not set(DESCRIPTIONS) & set(HELD_OUT_DESCRIPTIONS)


def test_the_clips_are_others_than_those_of_audio(planned):
    assert not {clip.clip_id for clip in planned} & {clip.clip_id for clip in plan_corpus(1200, seed=0)}
    described = [clip.text for clip in planned]
    assert described != [clip.text for clip in plan_text(1200, seed=1)]


def test_the_command_writes_the_same_bytes_again_and_no_audio(tmp_path, capsys):
    for name in ("a", "b"):
        assert main([str(tmp_path / name), "--text", "--clips", "60", "--seed", "3"]) == 0
    assert bytes_by_name(tmp_path / "a") == bytes_by_name(tmp_path / "b")
    assert sorted(bytes_by_name(tmp_path / "a")) == ["synth.json", "test.jsonl", "train.jsonl"]
    record = json.loads((tmp_path / "a" / "synth.json").read_text())
    assert record["train_clips"] + record["test_clips"] == 60 and record["text"] is True
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert all("audio" not in row for row in rows)
    assert "text alone" in capsys.readouterr().out


def test_a_folder_with_another_kind_of_corpus_is_refused(tmp_path):
    main([str(tmp_path / "text"), "--text", "--clips", "30"])
    with pytest.raises(UserError, match="other settings"):
        main([str(tmp_path / "text"), "--text", "--clips", "60"])
    with pytest.raises(UserError, match="other settings"):
        main([str(tmp_path / "text"), "--clips", "30"])


def test_dry_run_counts_the_text_and_writes_nothing(tmp_path):
    figures = tmp_path / "figures.json"
    assert main([str(tmp_path / "text"), "--text", "--clips", "60", "--dry-run", "--json", str(figures)]) == 0
    assert not (tmp_path / "text").exists()
    counts = json.loads(figures.read_text())
    assert counts["clips"] == 60 and counts["questions"] == sum(len(clip.questions) for clip in plan_text(60, 0))
