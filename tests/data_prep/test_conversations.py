"""Tests that what a conversation says and a single question cannot hold is refused by name, never flattened or cut."""

import json

import pytest

from data_prep.manifests.conversations import single_exchange
from data_prep.manifests.reader import read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config

QUESTION, ANSWER = {"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}
MORE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Far."}]
CHAT = {"messages": [QUESTION, ANSWER], "audios": ["a.wav"]}
HUMAN, GPT = {"from": "human", "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "A dog."}
FLAMINGO = {"sound": "a.wav", "conversations": [HUMAN, GPT]}
SLAM = {"key": "1", "source": "a.wav", "target": "hello", "prompt": "Write."}
OPENAQA = {"instruction": "What?", "input": "", "audio_id": "a.wav", "dataset": "d", "task": "t", "output": "A dog."}


def read(tmp_path, *rows):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clips = read_clips(prepare_config(tmp_path / "m.jsonl", tmp_path / "out"))
    return [(clip.clip_id, question.question, question.answer) for clip in clips for question in clip.questions]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**CHAT, "messages": [QUESTION, ANSWER, *MORE]}, "has 2 exchanges"),
        ({**CHAT, "messages": [{"role": "system", "content": "In French."}, QUESTION, ANSWER]}, "system turn"),
        ({**CHAT, "system": "In French."}, "field 'system'"),
        ({**CHAT, "history": [["Who?", "I."]]}, "field 'history'"),
        ({**CHAT, "images": ["a.png"]}, "field 'images'"),
        ({**CHAT, "rejected_response": "A cat."}, "field 'rejected_response'"),
        ({**CHAT, "label": False}, "field 'label'"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "loss": False}]}, "turn 2: is not trained on"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "loss": False}, *MORE]}, "turn 2: is not trained on"),
        ({**CHAT, "messages": [QUESTION, {"role": "tool", "content": "x"}]}, "turn 2: has the role 'tool'"),
        ({**CHAT, "messages": [QUESTION, {"role": ["user"], "content": "x"}]}, "turn 2: has the role"),
        ({**CHAT, "messages": [QUESTION]}, "does not alternate"),
        ({**CHAT, "messages": []}, "does not alternate"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}, ANSWER]}, "list of parts"),
        ({**CHAT, "messages": [{"role": "user"}, ANSWER]}, "turn 1: row without the field 'content'"),
        ({**CHAT, "messages": [{"role": "user", "content": "<audio><audio>Same?"}, ANSWER]}, "2 audio placeholders"),
        ({**CHAT, "messages": [{"role": "user", "content": "Is <audio> real?"}, ANSWER]}, "within the question"),
        ({**CHAT, "messages": [{"role": "user", "content": "<image><audio>What?"}, ANSWER]}, "image or a video"),
        ({**CHAT, "messages": [QUESTION, {"role": "assistant", "content": "<audio>"}]}, "placeholder in the answer"),
        ({**CHAT, "audios": ["a.wav", "b.wav"]}, "2 audios"),
        ({**CHAT, "audios": []}, "0 audios"),
        ({**CHAT, "audios": "a.wav"}, "field 'audios'"),
        ({"conversations": [HUMAN, GPT, HUMAN, GPT], "audios": ["a.wav"]}, "has 2 exchanges"),
        ({"conversations": [HUMAN, GPT], "audios": ["a.wav"], "system": "In French."}, "field 'system'"),
        ({**FLAMINGO, "conversations": [HUMAN, GPT, HUMAN, GPT]}, "has 2 exchanges"),
        ({**FLAMINGO, "conversations": [{"from": "system", "value": "In French."}, HUMAN, GPT]}, "system turn"),
        ({**FLAMINGO, "sound": ["a.wav", "b.wav"]}, "2 sounds"),
        ({**FLAMINGO, "start": 3.0, "end": 5.0}, "field 'start' selects a segment"),
        ({**CHAT, "end_time": 5.0}, "field 'end_time' selects a segment"),
        ({**SLAM, "offset": 3.0}, "field 'offset' selects a segment"),
        ({**OPENAQA, "segment": [1, 2]}, "field 'segment' selects a segment"),
    ],
)
def test_a_row_that_one_question_cannot_hold_is_refused_by_name(tmp_path, row, fault):
    with pytest.raises(UserError) as error:
        read(tmp_path, row)
    assert "m.jsonl:1" in str(error.value) and fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {**CHAT, "messages": [{"role": "system", "content": ""}, QUESTION, {**ANSWER, "loss": True}]},
        {**CHAT, "images": [], "system": None, "tools": "", "label": True, "start": 0},
        {"conversations": [HUMAN, GPT], "audios": ["a.wav"]},
        {**FLAMINGO, "id": 1, "duration": 10.0},
        {**FLAMINGO, "sound": ["a.wav"]},
    ],
)
def test_what_one_question_can_hold_is_read(tmp_path, row):
    assert read(tmp_path, row) == [("a.wav", "What?", "A dog.")]


@pytest.mark.parametrize(
    "placeholder",
    [
        "<audio>", "<sound>", "<speech>", "<Audio>", "<sound-1>", "<|AUDIO|>", "<|audio|>", "<|audio_1|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_start|><|audio_pad|><|audio_end|>",
        "<Audio><AudioHere></Audio>", "<Speech><SpeechHere></Speech>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["{}What?", "{}\nWhat?", "What?\n{}"])
def test_the_placeholders_of_other_tools_leave_the_question(placeholder, text):
    turns = [{"role": "user", "content": text.format(placeholder)}, ANSWER]
    assert single_exchange(turns, "here") == ("What?", "A dog.")


def test_text_that_only_resembles_a_placeholder_is_kept():
    turns = [{"role": "user", "content": "Which tag, <audioclip> or a < b?"}, ANSWER]
    assert single_exchange(turns, "here") == ("Which tag, <audioclip> or a < b?", "A dog.")
