"""Tests that conversations of other tools are kept whole, and that a row that a set cannot hold is rejected by name."""

import json

import pytest

from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import read_clips
from pipeline.core.errors import UserError
from tests.helpers.corpora import prepare_config

QUESTION, ANSWER = {"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A dog."}
MORE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Far."}]
CHAT = {"messages": [QUESTION, ANSWER], "audios": ["a.wav"]}
HUMAN, GPT = {"from": "human", "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "A dog."}
FLAMINGO = {"sound": "a.wav", "conversations": [HUMAN, GPT]}
SHAREGPT = {"conversations": [{"from": "human", "value": "<audio>What?"}, GPT], "audios": ["a.wav"]}
SLAM = {"key": "1", "source": "a.wav", "target": "hello", "prompt": "Write."}
OPENAQA = {"instruction": "What?", "input": "", "audio_id": "a.wav", "dataset": "d", "task": "t", "output": "A dog."}


def read_rows(tmp_path, *rows):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_clips(prepare_config(tmp_path / "m.jsonl", tmp_path / "out")))


def read(tmp_path, *rows):
    clips = read_rows(tmp_path, *rows)
    return [(clip.clip_id, question.question, question.answer) for clip in clips for question in clip.questions]


def conversation(tmp_path, row):
    """Returns the single question of a row, its turns as (role, content), and the ids of all clips."""
    clips = read_rows(tmp_path, row)
    assert all(isinstance(clip, Clip) for clip in clips), clips
    (question,) = (question for clip in clips for question in clip.questions)
    return question, [turn.content for turn in question.conversation], [clip.clip_id for clip in clips]


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**CHAT, "history": [["Who?", "I."]]}, "field 'history' holds earlier turns"),
        ({**CHAT, "tools": [{}]}, "field 'tools' holds tools"),
        ({**CHAT, "images": ["a.png"]}, "field 'images' holds images"),
        ({**CHAT, "rejected_response": "A cat."}, "field 'rejected_response' holds a rejected answer"),
        ({**CHAT, "label": False}, "field 'label' marks an unwanted answer"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "loss": False}]}, "no answer is trained on"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "weight": 0}]}, "no answer is trained on"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "loss": 0.5}]}, "turn 2 has a loss of its own (0.5)"),
        ({**CHAT, "messages": [{**QUESTION, "loss": True}, ANSWER]}, "turn 1 is trained on, and is no answer"),
        ({**CHAT, "messages": [QUESTION, {"role": "tool", "content": "x"}]}, "turn 2 has the role 'tool'"),
        ({**CHAT, "messages": [QUESTION, {**ANSWER, "tool_calls": [{}]}]}, "turn 2 has the field 'tool_calls'"),
        ({**CHAT, "messages": [QUESTION, {"role": ["user"], "content": "x"}]}, "turn 2 has the role"),
        ({**CHAT, "messages": [QUESTION]}, "does not alternate between user and assistant"),
        ({**CHAT, "messages": []}, "does not alternate"),
        ({**CHAT, "messages": [QUESTION, QUESTION, ANSWER]}, "does not alternate"),
        ({**CHAT, "messages": [QUESTION, ANSWER, {"role": "system", "content": "x"}, *MORE]}, "behind other turns"),
        ({**CHAT, "system": "A", "messages": [{"role": "system", "content": "B"}, QUESTION, ANSWER]}, "two system"),
        ({**CHAT, "messages": [{"role": "system", "content": "<audio>"}, *MORE]}, "a sound in its system text"),
        ({**CHAT, "messages": [QUESTION, {"role": "assistant", "content": " "}]}, "answer 1 is empty"),
        ({**CHAT, "messages": [QUESTION, {"role": "assistant", "content": None}]}, "turn 2 has no content"),
        ({**CHAT, "messages": [QUESTION, ANSWER, user(" "), ANSWER]}, "turn 3 is empty"),
        ({**CHAT, "messages": [user("<audio><audio>Same?"), ANSWER]}, "2 audio placeholders for 1 sounds"),
        ({**CHAT, "messages": [user("<image><audio>What?"), ANSWER]}, "turn 1 has the placeholder <image>"),
        ({**CHAT, "messages": [QUESTION, {"role": "assistant", "content": "<audio>"}]}, "placeholder in an answer"),
        ({**CHAT, "audios": []}, "has no audio"),
        ({"messages": MORE}, "has no audio"),
        ({**SHAREGPT, "audios": ["a.wav", "b.wav"]}, "1 audio placeholders for 2 sounds"),
        ({**FLAMINGO, "sound": ["a.wav", "b.wav"]}, "1 audio placeholders for 2 sounds"),
        ({**FLAMINGO, "sound": ""}, "has no audio"),
        ({"messages": [user([{"type": "image_url"}]), ANSWER]}, "turn 1 has a part of type 'image_url'"),
        ({"messages": [user([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]), ANSWER]}, "base64"),
        ({"messages": [user([{"type": "audio_url", "audio_url": "data:audio/wav;base64,AA"}]), ANSWER]}, "base64"),
        ({**CHAT, "audios": ["b.wav"], "messages": [user([{"type": "audio", "audio": "a.wav"}]), ANSWER]}, "both in"),
        ({**CHAT, "messages": [user("<|audio_2|>What?"), ANSWER]}, "numbers its 1 sounds 2"),
        ({**CHAT, "end_frame": 100}, "field 'end_frame' selects a segment in frames"),
        ({**OPENAQA, "segment": [1, 2]}, "field 'segment' lists segments"),
        ({**CHAT, "start": [0, 1]}, "field 'start' is [0, 1], not one time"),
        ({**CHAT, "start": "00:01"}, "field 'start' is '00:01', not one time"),
        ({**CHAT, "start": 1, "offset": 2}, "fields 'start' and 'offset' select different segments"),
        ({**CHAT, "messages": [user("<audio><audio>"), ANSWER], "audios": ["a.wav", "b.wav"], "end": 2}, "several"),
        ({**SLAM, "system": "In French."}, "field 'system' holds a system text"),
    ],
)
def test_a_row_that_a_set_cannot_hold_is_rejected_by_name_and_no_other(tmp_path, row, fault):
    good = {**CHAT, "audios": ["good.wav"]} if "messages" in row else row | {"fault": None}
    rejected, *others = read_rows(tmp_path, row, *([good] if "messages" in row else []))
    assert isinstance(rejected, RejectedRow) and rejected.reason == "unsupported"
    assert rejected.clip_id.endswith("m.jsonl:1") and fault in rejected.detail and "\n" not in rejected.detail
    assert [clip.clip_id for clip in others] == (["good.wav"] if "messages" in row else [])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**CHAT, "messages": [{"role": "user"}, ANSWER]}, "turn 1: row without the field 'content'"),
        ({**CHAT, "messages": [{"content": "<audio>What?"}, ANSWER]}, "turn 1: row without the field 'role'"),
        ({**CHAT, "messages": [user(3), ANSWER]}, "turn 1: 'content' is int, not text"),
        ({**CHAT, "audios": 3}, "field 'audios"),
        ({**CHAT, "messages": "What?"}, "field 'messages"),
    ],
)
def test_a_malformed_row_stops_the_run(tmp_path, row, fault):
    with pytest.raises(UserError) as error:
        read_rows(tmp_path, row)
    assert "m.jsonl:1" in str(error.value) and fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {**CHAT, "audios": "a.wav"},
        {**CHAT, "audios": [{"path": "a.wav"}]},
        {**CHAT, "messages": [{"role": "system", "content": ""}, QUESTION, {**ANSWER, "loss": True}]},
        {**CHAT, "messages": [user("What?"), ANSWER]},
        {**CHAT, "images": [], "system": None, "tools": "", "label": True, "start": 0},
        {"messages": [user([{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What?"}]), ANSWER]},
        {"messages": [user([{"type": "audio_url", "audio_url": {"url": "a.wav"}}, "What?"]), ANSWER]},
        {**CHAT, "messages": [user([{"type": "audio"}, {"type": "text", "text": "What?"}]), ANSWER]},
        {"query": "<audio>What?", "response": "A dog.", "audios": ["a.wav"]},
        {"instruction": "<audio>What?", "input": "", "output": "A dog.", "audios": ["a.wav"]},
        SHAREGPT,
        {**FLAMINGO, "id": 1, "duration": 10.0},
        {**FLAMINGO, "sound": ["a.wav"]},
    ],
)
def test_an_exchange_about_one_sound_in_front_is_a_plain_question(tmp_path, row):
    (clip,) = read_rows(tmp_path, row)
    assert clip.model_dump(mode="json", exclude={"root"}) == {
        "clip_id": "a.wav",
        "audio": "a.wav",
        "dataset": "unspecified",
        "domain": "unspecified",
        "questions": [
            {"question_id": "a.wav/0", "question": "What?", "answer": "A dog.", "task": "unspecified", "choices": None}
        ],
    }


@pytest.mark.parametrize(
    "placeholder",
    [
        "<audio>", "<sound>", "<speech>", "<Audio>", "<sound-1>", "<|AUDIO|>", "<|audio|>", "<|audio_1|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_start|><|audio_pad|><|audio_end|>",
        "<Audio><AudioHere></Audio>", "<Speech><SpeechHere></Speech>",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("{}What?", [0, "What?"]),
        ("{}\nWhat?", [0, "What?"]),
        ("What?\n{}", ["What?\n", 0]),
        ("Is {} real?", ["Is ", 0, " real?"]),
    ],
)
def test_the_placeholders_of_other_tools_keep_their_place(tmp_path, placeholder, text, content):
    question, turns, _ = conversation(tmp_path, {**CHAT, "messages": [user(text.format(placeholder)), ANSWER]})
    assert turns == [content, ["A dog."]] and (question.turns is None) == (content[0] == 0)


def test_text_that_only_resembles_a_placeholder_is_kept(tmp_path):
    row = {**CHAT, "messages": [user("Which tag, <audioclip> or a < b?"), ANSWER]}
    assert read(tmp_path, row) == [("a.wav", "Which tag, <audioclip> or a < b?", "A dog.")]


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "messages": [QUESTION, ANSWER, *MORE]},
        {"query": "Where?", "response": "Far.", "history": [["<audio>What?", "A dog."]], "audios": "a.wav"},
        {"instruction": "Where?", "output": "Far.", "history": [["<audio>What?", "A dog."]], "audios": ["a.wav"]},
        {
            **FLAMINGO,
            "conversations": [HUMAN, GPT, {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Far."}],
        },
    ],
)
def test_later_turns_keep_the_turns_before_them(tmp_path, row):
    question, turns, _ = conversation(tmp_path, row)
    assert turns == [[0, "What?"], ["A dog."], ["Where?"], ["Far."]]
    assert (question.question, question.answer) == ("Where?", "Far.")
    assert [turn.loss for turn in question.turns[1::2]] == [True, True]


@pytest.mark.parametrize("mark", [{"loss": False}, {"loss": 0}, {"weight": 0}])
def test_an_answer_without_loss_stays_in_the_history(tmp_path, mark):
    question, turns, _ = conversation(tmp_path, {**CHAT, "messages": [QUESTION, {**ANSWER, **mark}, *MORE]})
    assert [turn.loss for turn in question.turns[1::2]] == [False, True] and turns[1] == ["A dog."]


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "system": "In French."},
        {**CHAT, "messages": [{"role": "system", "content": "In French."}, QUESTION, ANSWER]},
        {**CHAT, "system": "In French.", "messages": [{"role": "system", "content": "In French."}, QUESTION, ANSWER]},
        {**FLAMINGO, "conversations": [{"from": "system", "value": "In French."}, HUMAN, GPT]},
        {**SHAREGPT, "system": "In French."},
    ],
)
def test_the_system_text_of_a_row_is_kept(tmp_path, row):
    question, turns, _ = conversation(tmp_path, row)
    assert question.system == "In French." and question.turns is None and turns[0] == [0, "What?"]


@pytest.mark.parametrize(
    ("row", "content", "clips"),
    [
        (
            {"messages": [user("Is <audio> like <audio>?"), ANSWER], "audios": ["a.wav", "b.wav"]},
            ["Is ", 0, " like ", 1, "?"],
            ["a.wav", "b.wav"],
        ),
        (  # ms-swift puts the missing placeholders in front of all others
            {"messages": [user("Like <audio>?"), ANSWER], "audios": ["a.wav", "b.wav"]},
            [0, "Like ", 1, "?"],
            ["a.wav", "b.wav"],
        ),
        (
            {"sound": ["a.wav", "b.wav"], "conversations": [{"from": "human", "value": "Same?"}, GPT]},
            [0, 1, "Same?"],
            ["a.wav", "b.wav"],
        ),
        (
            {"messages": [user("<|audio_2|> or <|audio_1|>?"), ANSWER], "audios": ["a.wav", "b.wav"]},
            [0, "or ", 1, "?"],
            ["b.wav", "a.wav"],
        ),
        (
            {
                "messages": [
                    user([{"type": "audio", "path": "a.wav"}, " or ", {"type": "audio", "path": "b.wav"}]),
                    ANSWER,
                ]
            },
            [0, "or ", 1],
            ["a.wav", "b.wav"],
        ),
        (
            {"messages": [user("Audio 1: <audio>\nAudio 2: <audio>\nSame?"), ANSWER], "audios": ["a.wav", "b.wav"]},
            ["Audio 1: ", 0, "\nAudio 2: ", 1, "\nSame?"],
            ["a.wav", "b.wav"],
        ),
    ],
)
def test_each_sound_of_a_conversation_stands_at_its_placeholder(tmp_path, row, content, clips):
    question, turns, ids = conversation(tmp_path, row)
    assert turns[0] == content and ids == clips and question.clips == clips[1:]


def test_a_sound_of_a_later_turn_belongs_to_that_turn(tmp_path):
    row = {**CHAT, "messages": [QUESTION, ANSWER, user("And <audio>?"), ANSWER], "audios": ["a.wav", "b.wav"]}
    question, turns, _ = conversation(tmp_path, row)
    assert turns == [[0, "What?"], ["A dog."], ["And ", 1, "?"], ["A dog."]] and question.clips == ["b.wav"]


def test_another_sound_is_the_clip_that_a_row_is_about(tmp_path):
    pair = {"messages": [user("Is <audio> like <audio>?"), ANSWER], "audios": ["a.wav", "b.wav"]}
    own = {"key": "bell", "source": "b.wav", "target": "hello", "prompt": "Write."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    for order in (["pairs", "own"], ["own", "pairs"]):
        manifests = [tmp_path / f"{name}.jsonl" for name in order]
        clips = list(read_clips(prepare_config(manifests, tmp_path / "out")))
        assert sorted(clip.clip_id for clip in clips) == ["a.wav", "bell"]
        (question,) = next(clip for clip in clips if clip.clip_id == "a.wav").questions
        assert question.clips == ["bell"]


def test_an_id_that_another_sound_has_is_not_taken_twice(tmp_path):
    rows = [
        {
            "clip_id": "a",
            "audio": "a.wav",
            "questions": [{"question": "<audio> or <audio>?", "answer": "no", "other_audio": ["b.wav"]}],
        },
        {"clip_id": "b.wav", "audio": "c.wav", "questions": [{"question": "What?", "answer": "c"}]},
    ]
    clips = read_rows(tmp_path, *rows)
    assert [(clip.clip_id, clip.audio) for clip in clips] == [
        ("a", "a.wav"),
        ("b.wav@b.wav", "b.wav"),
        ("b.wav", "c.wav"),
    ]
    assert clips[0].questions[0].clips == ["b.wav@b.wav"]
