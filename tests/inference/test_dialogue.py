"""Questions about several clips, and conversations, are answered as in one pass over the whole conversation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question, Turn
from pipeline.core.streams import Preset
from pipeline.inference.dialogue import Dialogue
from pipeline.inference.responder import Features, Responder
from tests.helpers.byte_responders import WIDTH, build_responder, full_answer

CLIPS: list[Features] = [
    {"log_mel": np.random.default_rng(n).normal(size=(3 + n, WIDTH)).astype(np.float16)} for n in range(3)
]


def converse(responder: Responder, clips: list[Features], *texts: str, keeps_history: bool = True) -> Dialogue:
    dialogue = Dialogue(responder, clips, keeps_history=keeps_history)
    for text in texts:
        dialogue.ask(text, lambda _: None)
    return dialogue


@pytest.mark.parametrize("preset", ["lal", "plits", "pal_v3"])
@pytest.mark.parametrize("count", [1, 2])
def test_each_turn_is_answered_as_in_one_pass_over_the_conversation(
    tmp_path: Path, preset: Preset, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder, clips = build_responder(tmp_path, preset), CLIPS[:count]
    encoded: list[int] = []
    prefill = responder.prefill_prompts
    monkeypatch.setattr(responder, "prefill_prompts", lambda *a: encoded.append(len(a[1])) or prefill(*a))
    dialogue = converse(responder, clips, "What is it?", "And then?", "Why?")
    assert encoded == [count], "the audio is prefilled once"
    assert [len(question.conversation) for question in dialogue.questions] == [2, 4, 6]
    history: list[Turn] = []
    for question in dialogue.questions:
        content = [*range(count), question.question] if not history else [question.question]
        turns = [*history, Turn(role="user", content=content), Turn(role="assistant", content=[question.answer])]
        others = ["b"] if count == 2 else None
        whole = Question(question_id="q", question=question.question, answer="", turns=turns, clips=others)
        assert full_answer(responder, whole, clips) == question.answer
        history = turns
    alone = converse(responder, clips, "What is it?", "And then?", "Why?", keeps_history=False)
    assert [question.answer for question in alone.questions] != [question.answer for question in dialogue.questions]


@pytest.mark.parametrize("preset", ["lal", "plits", "pal_v3"])
def test_clips_stand_where_a_question_names_them_or_in_front(tmp_path: Path, preset: Preset) -> None:
    responder = build_responder(tmp_path, preset)
    contents: dict[str, list[str | int]] = {
        "Is <audio> louder than <audio>?": ["Is ", 0, " louder than ", 1, "?"],
        "<audio> or <audio>": [0, " or ", 1],
        "Which?": [0, 1, "Which?"],
    }
    dialogue = converse(responder, CLIPS[:2], *contents, keeps_history=False)
    for question, content in zip(dialogue.questions, contents.values(), strict=True):
        turns = [Turn(role="user", content=content), Turn(role="assistant", content=[""])]
        stored = Question(question_id="q", question="?", answer="", turns=turns, clips=["b"])
        assert question.answer == full_answer(responder, stored, CLIPS[:2])
    swapped = converse(responder, CLIPS[1::-1], *contents, keeps_history=False)
    assert [question.answer for question in swapped.questions] != [question.answer for question in dialogue.questions]


def test_one_clip_and_no_history_is_a_plain_question(tmp_path: Path) -> None:
    responder = build_responder(tmp_path, "pal_v3")
    dialogue = converse(responder, CLIPS[:1], "What is <audio>?", "Why?", keeps_history=False)
    replies = responder.answer(responder.prefill(CLIPS[:1]), ["What is <audio>?", "Why?"], [0, 0])
    assert [question.answer for question in dialogue.questions] == [reply.text for reply in replies]


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (["Is <audio>?"], "names 1 clips by <audio>, but there are 3"),
        (["<audio><audio><audio><audio>"], "names 4 clips"),
        (["Which?", "And <audio>?"], "names <audio> in a later turn"),
    ],
)
def test_a_wrong_number_of_clips_is_refused(tmp_path: Path, texts: list[Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        converse(build_responder(tmp_path, "lal"), CLIPS, *texts)
