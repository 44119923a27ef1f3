"""The corpus of text: every answer follows from its description, and held-out wordings are new but of known words."""

import json
import re
from pathlib import Path

import pytest

from data_prep.synth import main
from data_prep.synth.corpus import plan_corpus
from data_prep.synth.descriptions import DESCRIPTIONS, HELD_OUT_QUESTIONS, MORE_QUESTIONS
from data_prep.synth.questions import WORDINGS
from data_prep.synth.text import plan_text
from pipeline.core.errors import UserError

NUMBERS = {1: "one", 2: "two", 3: "three"}
HIGHEST = {"rising": "last", "falling": "first", "up then down": "middle"}


@pytest.fixture(scope="module")
def planned():
    return plan_text(1200, seed=0)


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(domain: str, text: str) -> dict[str, str]:
    """Answers every task from a description alone."""
    items = re.findall(
        r"(?:only|first|then|last) (\w+)((?: (?:rising|falling|steady|loud|long)\b)*)", text.replace("up then down", "")
    )
    names = [name for name, _ in items]
    answers = {"first": names[0], "last": names[-1], "count": NUMBERS[len(names)] if domain != "music" else ""}
    if domain == "sound":
        marks = {mark: name for name, words in items for mark in words.split()}
        directions = {"rising", "falling", "steady"} & marks.keys()
        answers |= {"what": names[0], "loudest": marks.get("loud", ""), "longest": marks.get("long", "")}
        answers["direction"] = "".join(directions)
    elif domain == "music":
        contour = re.search(r"up then down|rising|falling", text)[0]
        answers |= {"what": names[0], "count": re.search(r"three|four|five", text)[0], "contour": contour}
        answers |= {"tempo": re.search(r"slow|medium|fast", text)[0], "highest": HIGHEST[contour]}
    else:
        longest = re.search(r"long (?:vowel is )?([aiu])\b|the ([aiu]) is long", text, re.IGNORECASE)
        answers |= {"transcribe": " ".join(names), "longest": longest[1] or longest[2]}
        answers["speaker"] = re.search(r"\b(man|woman|child)\b", text)[0]
    return answers


def test_every_answer_follows_from_the_description(planned):
    for clip in planned:
        answers = read(clip.domain, clip.text)
        for question in clip.questions:
            assert question["question"].startswith(f"{clip.text}\n")
            assert question["answer"] == answers[question["task"].partition(".")[2]], question


def test_all_tasks_of_audio_are_asked_in_both_parts(planned):
    for held_out in (False, True):
        tasks = {question["task"] for clip in planned if clip.held_out == held_out for question in clip.questions}
        assert tasks == WORDINGS.keys()


def test_held_out_wordings_are_new_and_made_of_known_words(planned):
    def words(held_out):
        texts = [q["question"] for clip in planned if clip.held_out == held_out for q in clip.questions]
        return set(re.findall(r"\w+", " ".join(texts).lower()))

    assert words(True) <= words(False)
    for task, wordings in HELD_OUT_QUESTIONS.items():
        assert not set(wordings) & {*WORDINGS[task], *MORE_QUESTIONS[task]}
    for training, held_out in DESCRIPTIONS.values():
        assert not set(training) & set(held_out)


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
