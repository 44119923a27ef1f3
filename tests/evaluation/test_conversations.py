"""Conversations of a prepared set are answered after their own history, system text and clips, as in one pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.labels import IGNORE_INDEX
from pipeline.core.streams import Preset
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.baselines import swap_audio
from pipeline.evaluation.generate_answers import generate_answers, group_clips
from pipeline.evaluation.question_sets import clips_with_questions, conversation_clips
from pipeline.inference.responder import Responder
from tests.helpers.byte_responders import WIDTH, build_responder, full_answer
from tests.helpers.feature_sets import write_rows

NAMES = ("a", "b", "c", "d")
PLAIN = {"question": "What?", "answer": "a dog"}
CHOICES = {"question": "Which?", "answer": "cat", "choices": ["dog", "cat"]}
SYSTEM = {"question": "What?", "answer": "rain", "system": "Be brief."}


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": list(content) if isinstance(content, tuple) else [content],
        }
        for number, content in enumerate(contents)
    ]


HISTORY = {"question": "And then?", "answer": "a cat", "turns": turns((0, "What?"), "a dog", "And then?", "a cat")}
HISTORY_TOO = {"question": "Why?", "answer": "fear", "turns": turns((0, "What?"), "a dog", "Why?", "fear")}
TWO_CLIPS = {
    "question": "Which is louder?",
    "answer": "the first",
    "turns": turns(("Is ", 0, " louder than ", 1, "?"), "yes", ("And ", 1, " than ", 0, "?"), "no"),
    "clips": ["d"],
}
NO_CLIP = {"question": "Who are you?", "answer": "a model", "turns": turns("Who are you?", "a model")}
QUESTIONS = (
    [PLAIN, {**PLAIN, "question": "How many?"}, HISTORY, TWO_CLIPS],
    [SYSTEM, CHOICES, HISTORY_TOO, NO_CLIP],
    [HISTORY, {**TWO_CLIPS, "clips": ["a"]}],
    [],
)


def write_set(folder: Path, questions: Any = QUESTIONS) -> FeatureSet:
    rows = [
        {
            "clip_id": name,
            "duration_s": 1.0,
            "dataset": "synth",
            "domain": "sound",
            "questions": [
                {"question_id": f"{name}/{number}", "task": "t", **question} for number, question in enumerate(asked)
            ],
        }
        for name, asked in zip(NAMES, questions, strict=True)
    ]
    frames = [np.random.default_rng(n).normal(size=(3 + n, WIDTH)).astype(np.float16) for n in range(len(NAMES))]
    return FeatureSet(write_rows(folder, rows, {"log_mel": frames}), ["log_mel"])


def answers_of(responder: Responder, features: FeatureSet, pairing: dict[int, int], batch_size: int) -> dict[int, str]:
    groups = group_clips(features.table, pairing, batch_size, clips_with_questions(features, None))
    answers = generate_answers(responder, features, groups, batch_size, show_progress=False)
    return {index: reply.text for group in answers for index, reply in group.items()}


@pytest.mark.parametrize("preset", ["lal", "plits", "pal_v3", "flamingo"])
def test_every_question_is_answered_as_its_whole_conversation_in_one_pass(tmp_path: Path, preset: Preset) -> None:
    responder, features = build_responder(tmp_path / "tokenizer", preset), write_set(tmp_path / "set")
    clips = conversation_clips(features, clips_with_questions(features, None))
    assert clips == [0, 1, 2, 3]
    swapped = swap_audio(features, clips)
    assert swapped.keys() == {0, 1, 2, 3} and all(clip != other for clip, other in swapped.items())
    for pairing in ({clip: clip for clip in clips}, swapped):
        expected = {}
        for index in range(len(features.table)):
            own = int(features.table.clip[index])
            question = features.clip(own).questions[features.table.number[index]]
            named = [own, *(NAMES.index(name) for name in question.clips or ())]
            audio = [features.features(pairing[clip], NAMES[pairing[clip]]) for clip in named]
            expected[index] = full_answer(responder, question, audio)
        for batch_size in (3, 64):
            assert answers_of(responder, features, pairing, batch_size) == expected, batch_size
        assert len(set(expected.values())) > len(expected) / 2, "the answers depend on what is read"


def test_without_audio_the_prompts_are_those_of_text_alone(tmp_path: Path) -> None:
    responder, features = build_responder(tmp_path / "tokenizer", "lal"), write_set(tmp_path / "set")
    template = responder.chat_template
    groups = group_clips(features.table, {clip: clip for clip in range(4)}, 64)
    without_audio = [replace(group, audio=None) for group in groups]
    answers = [answer for group in generate_answers(responder, features, without_audio, 64) for answer in group.items()]
    assert len(answers) == len(features.table)
    for index, reply in answers:
        question = features.clip(int(features.table.clip[index])).questions[features.table.number[index]]
        prompt = template.prompt_of(question)
        ids = [token for token in prompt.prefix + prompt.suffix if token != template.audio_token_id]
        if question.turns is None:
            row = template.row([question], audio=False)
            assert ids == row.input_ids[row.labels == IGNORE_INDEX].tolist(), "as in training on text"
        generated = responder.model.generate(
            torch.tensor([ids]),
            max_new_tokens=responder.max_new_tokens,
            do_sample=False,
            eos_token_id=template.end_token_id,
            pad_token_id=template.pad_token_id,
        )
        assert reply.text == template.decode(generated[0].tolist())


def test_questions_that_begin_alike_share_a_row_and_each_clip_is_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder, features = build_responder(tmp_path / "tokenizer", "lal"), write_set(tmp_path / "set")
    calls: list[tuple[int, int, int]] = []
    prefill = responder.prefill_prompts

    def counting_prefill(prefixes: Any, clips: Any, placeholders: Any, hidden: Any) -> Any:
        calls.append((len(prefixes), len(clips), len(placeholders)))
        return prefill(prefixes, clips, placeholders, hidden)

    monkeypatch.setattr(responder, "prefill_prompts", counting_prefill)
    answers_of(responder, features, {clip: clip for clip in range(4)}, 64)
    # Rows: a and its two-clip conversation; b, b with its own system text, and no clip; c and its conversation.
    assert calls == [(2 + 3 + 2, 4, 1 + 4 + 1 + 1 + 0 + 1 + 4)]


def test_the_history_of_a_question_changes_its_answer(tmp_path: Path) -> None:
    responder = build_responder(tmp_path / "tokenizer", "pal_v3")
    other = {**HISTORY, "turns": turns((0, "What?"), "a bird", "And then?", "a cat")}
    features = write_set(tmp_path / "set", ([HISTORY, other, {**HISTORY, "turns": None}], [], [], []))
    answers = answers_of(responder, features, {0: 0}, 4)
    assert len(set(answers.values())) == 3


@pytest.mark.parametrize("preset", ["lal", "plits", "pal_v3"])
def test_attention_is_measured_over_the_whole_conversation(tmp_path: Path, preset: Preset) -> None:
    responder, features = build_responder(tmp_path / "tokenizer", preset), write_set(tmp_path / "set")
    conversation = features.clip(0).questions[3]
    clips = [features.features(0, "a"), features.features(3, "d")]
    mass = responder.attention_mass(clips, conversation)
    assert mass.mass.shape[-1] == 3 and np.allclose(mass.mass.sum(-1), 1, atol=1e-5)
    counts = {len(weights[0]) for weights in mass.token_weights}
    assert max(counts) == 2 * (3 + 6), "each clip is read twice"
    other = conversation.model_copy(update={"answer": "x", "turns": [*conversation.turns[:-1], conversation.turns[1]]})
    assert not np.allclose(responder.attention_mass(clips, other).mass, mass.mass)
