"""Tests conversations in our own format."""

import json

import pytest

from data_prep.manifests.reader import read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config

ASSISTANT = {"role": "assistant", "content": "yes"}


def user(content):
    return {"role": "user", "content": content}


def read(tmp_path, question, **values):
    row = {"clip_id": "a", "audio": "a.wav", "questions": [question]}
    if values.get("encoders") == {}:
        del row["audio"]
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    clips = list(read_clips(prepare_config(tmp_path / "m.jsonl", tmp_path / "out", **values)))
    return clips, clips[0].questions[0]


@pytest.mark.parametrize(
    ("question", "contents", "clips"),
    [
        ({"turns": [user("Is <audio> loud?"), ASSISTANT]}, [["Is ", 0, " loud?"], ["yes"]], None),
        ({"question": "Is <audio> loud?", "answer": "yes"}, [["Is ", 0, " loud?"], ["yes"]], None),
        (
            {"turns": [user("Hello."), ASSISTANT, user("Loud?"), ASSISTANT]},
            [[0, "Hello."], ["yes"], ["Loud?"], ["yes"]],
            None,
        ),
        (
            {"turns": [user("<audio> or <audio>?"), ASSISTANT], "other_audio": ["b.wav"]},
            [[0, "or ", 1, "?"], ["yes"]],
            ["b.wav"],
        ),
        ({"turns": [user([0, "or ", 1]), ASSISTANT], "other_audio": ["b.wav"]}, [[0, "or ", 1], ["yes"]], ["b.wav"]),
        ({"turns": [user(["<audio> is a tag: ", 0]), ASSISTANT]}, [["<audio> is a tag: ", 0], ["yes"]], None),
        (
            {"turns": [user([{"type": "text", "text": "Loud: "}, {"type": "audio"}]), ASSISTANT]},
            [["Loud: ", 0], ["yes"]],
            None,
        ),
        (
            {
                "turns": [user("<audio> or <audio>?"), ASSISTANT],
                "other_audio": [{"audio": "a.wav", "start_s": 1, "end_s": 2.5}],
            },
            [[0, "or ", 1, "?"], ["yes"]],
            ["a.wav#t=1,2.5"],
        ),
    ],
)
def test_a_conversation_is_read_as_it_is_written(tmp_path, question, contents, clips):
    _, stored = read(tmp_path, question)
    assert [turn.content for turn in stored.turns] == contents and stored.clips == clips


@pytest.mark.parametrize(
    "question",
    [
        {"question": "Loud?", "answer": "yes"},
        {"question": "<audio>\nLoud?", "answer": "yes"},
        {"turns": [user("Loud?"), ASSISTANT]},
        {"turns": [user([0, "Loud?"]), ASSISTANT], "question": "Loud?", "answer": "yes"},
    ],
)
def test_an_exchange_with_the_clip_in_front_is_a_plain_question(tmp_path, question):
    _, stored = read(tmp_path, {**question, "system": "Be brief."})
    assert stored.model_dump() == {
        "question_id": "a/0",
        "question": "Loud?",
        "answer": "yes",
        "task": "unspecified",
        "choices": None,
        "system": "Be brief.",
    }


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Compare <audio> with <audio>.", "Compare <audio> with <audio>."),
        ("<audio> or <audio>?", "or <audio>?"),
        ("<audio><audio> Which?", "Which?"),
        ("Listen:<audio> <audio>", "Listen:<audio> <audio>"),
    ],
)
def test_the_question_of_a_conversation_shows_where_its_sounds_are(tmp_path, content, text):
    _, stored = read(tmp_path, {"turns": [user(content), ASSISTANT], "other_audio": ["b.wav"]})
    assert stored.question == text
    _, again = read(tmp_path, {"turns": [user(content), ASSISTANT], "other_audio": ["b.wav"], "question": text})
    assert again == stored


def test_an_answer_without_loss_is_kept(tmp_path):
    _, stored = read(tmp_path, {"turns": [user("Hello."), {**ASSISTANT, "loss": False}, user("Loud?"), ASSISTANT]})
    assert [turn.loss for turn in stored.turns[1::2]] == [False, True]


def test_a_text_set_holds_conversations_without_clips(tmp_path):
    question = {"turns": [user("Two and two?"), ASSISTANT, user("<audio> is a tag?"), ASSISTANT]}
    with pytest.raises(UserError, match="names 1 clips, the row has 0"):
        read(tmp_path, question, encoders={})
    _, stored = read(tmp_path, {"turns": [*question["turns"][:2], user("Sure?"), ASSISTANT]}, encoders={})
    assert [turn.content for turn in stored.turns] == [["Two and two?"], ["yes"], ["Sure?"], ["yes"]]


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ({"turns": [user("<audio> or <audio>?"), ASSISTANT]}, "question 1: names 2 clips, the row has 1"),
        ({"turns": [user([0, "or ", 2]), ASSISTANT], "other_audio": ["b.wav"]}, "names 3 clips, the row has 2"),
        ({"turns": [user([0, -1]), ASSISTANT]}, "names the clip -1"),
        ({"turns": [user("<audio>?"), ASSISTANT], "other_audio": ["b.wav"]}, "no turn names other_audio.0"),
        ({"turns": [user("Which?"), ASSISTANT], "other_audio": ["b.wav"]}, "no turn names the clip of the row"),
        ({"turns": [user([1, "or ", 0]), ASSISTANT], "other_audio": ["b.wav"]}, "names other_audio.0 before the clip"),
        ({"turns": [user("<audio>"), ASSISTANT, user([0, "?"]), ASSISTANT]}, "by index and by `<audio>`"),
        ({"turns": [user(" ")]}, "turn 1: is empty"),
        ({"turns": [user("Loud?"), {"role": "assistant", "content": ""}]}, "turn 2: is empty"),
        (
            {"turns": [user("Loud?"), {"role": "assistant", "content": "<audio>"}]},
            "turn 2: is an answer and names a clip",
        ),
        ({"turns": [user("Loud?"), ASSISTANT, user("Sure?")]}, "ends with a turn of the user"),
        ({"turns": [user("Loud?"), user("Sure?"), ASSISTANT]}, "turn 2: is of 'user'; alternate"),
        ({"turns": [{"role": "system", "content": "x"}, user("Loud?"), ASSISTANT]}, "turn 1: is a system text"),
        ({"turns": [{"role": "user"}, ASSISTANT]}, "turn 1: is no object with `role` and `content`"),
        ({"turns": [user(3), ASSISTANT]}, "turn 1: has a content that is no text"),
        ({"turns": [user([{"type": "image"}]), ASSISTANT]}, "turn 1: has the part {'type': 'image'}"),
        ({"turns": [user([True]), ASSISTANT]}, "turn 1: has the part True"),
        ({"turns": []}, "'turns' is no list of turns"),
        ({"turns": [user("Loud?"), ASSISTANT], "answer": "no"}, "'answer' differs from the last turns"),
        ({"turns": [user("Loud?"), ASSISTANT], "other_audio": "b.wav"}, "'other_audio' is no list"),
        (
            {"turns": [user("Loud?"), {**ASSISTANT, "weight": 2}, user("Sure?"), ASSISTANT]},
            "questions.0.turns.1.weight",
        ),
        ({"turns": [user("<audio><audio>"), ASSISTANT], "other_audio": [{"path": "b"}]}, "questions.0.other_audio.0"),
        ({"question": "Loud?"}, "questions.0.answer"),
    ],
)
def test_a_malformed_conversation_is_a_one_line_error_with_its_place(tmp_path, question, fault):
    with pytest.raises(UserError) as error:
        read(tmp_path, question)
    assert "m.jsonl:1" in str(error.value) and fault in str(error.value) and "\n" not in str(error.value)
