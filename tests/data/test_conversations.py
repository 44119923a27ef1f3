"""Conversations in the prompts of several families of templates, and in feature sets and batches."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pipeline.config import DataConfig, TrainConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question, Turn
from pipeline.core.labels import IGNORE_INDEX
from pipeline.core.ranks import Ranks
from pipeline.data.chat_template import AUDIO_TOKEN, ChatTemplate, load_tokenizer
from pipeline.data.feature_set import FeatureSet
from pipeline.data.loader import TrainingLoader, evaluation_batches
from tests.data.test_chat_template import GEMMA, LLAMA3, MISTRAL, THINKING
from tests.helpers.feature_sets import CHATML, byte_tokenizer, frames_of, write_feature_set, write_rows

# Qwen 3's template writes the thinking block only into the last answer.
QWEN3 = THINKING.replace(
    "message['role'] == 'assistant' %}<think>", "message['role'] == 'assistant' and loop.last %}<think>"
)

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3, "ltu": None}
SYSTEM = "You listen."


def user(*content: str | int) -> Turn:
    return Turn(role="user", content=list(content))


def assistant(text: str, loss: bool = True) -> Turn:
    return Turn(role="assistant", content=[text], loss=loss)


def conversation(*turns: Turn, **fields) -> Question:
    text = "".join(part for part in turns[-2].content if isinstance(part, str))
    fields = {"clips": ["clip-2", "clip-3"], **fields}
    return Question(question_id="q", question=text, answer=str(turns[-1].content[0]), turns=list(turns), **fields)


DIALOGUE = conversation(
    user(0, "What?"), assistant("A dog."), user("Like ", 1, " or ", 2, "?"), assistant("No.", loss=False), user("Why?"),
    assistant("Low."),
)  # fmt: skip


@pytest.fixture(params=list(TEMPLATES))
def template(request, tmp_path) -> ChatTemplate:
    byte_tokenizer(TEMPLATES[request.param]).save_pretrained(tmp_path)
    return ChatTemplate(load_tokenizer(tmp_path), SYSTEM, max_text_tokens=1000)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("chatml")
    byte_tokenizer().save_pretrained(folder)
    return ChatTemplate(load_tokenizer(folder), SYSTEM, max_text_tokens=1000)


def text_of(template: ChatTemplate, ids) -> str:
    return template._tokenizer.decode(ids)


def test_a_row_of_chatml_equals_the_rendered_template(chatml):
    row = chatml.row([DIALOGUE])
    contents = [AUDIO_TOKEN + "What?", "A dog.", f"Like {AUDIO_TOKEN} or {AUDIO_TOKEN}?", "No.", "Why?", "Low."]
    turns = [
        {"role": role, "content": content}
        for role, content in zip(["system", *["user", "assistant"] * 3], [SYSTEM, *contents], strict=True)
    ]
    assert text_of(chatml, row.input_ids) == chatml._tokenizer.apply_chat_template(turns, tokenize=False).rstrip()


def test_every_answer_with_a_loss_has_labels_up_to_the_end_of_its_turn(template):
    row = template.row([DIALOGUE])
    labelled = row.labels != IGNORE_INDEX
    assert (row.labels[labelled] == row.input_ids[labelled]).all()
    ends = np.flatnonzero(labelled & ~np.append(labelled[1:], False))
    starts = np.flatnonzero(labelled & ~np.append(False, labelled[:-1]))
    assert [template.decode(row.input_ids[s : e + 1]) for s, e in zip(starts, ends, strict=True)] == ["A dog.", "Low."]
    assert (row.input_ids[ends] == template.end_token_id).all()
    assert (row.input_ids == template.audio_token_id).sum() == 3


def test_the_history_of_each_turn_is_what_the_model_wrote(template):
    """The prompt of a turn continues the prompt and the answer of the turn before it, token by token."""
    row = template.row([DIALOGUE]).input_ids.tolist()
    for last, clips in ((2, (0,)), (4, (0, 1, 2)), (6, (0, 1, 2))):
        prompt = template.prompt_of(conversation(*DIALOGUE.turns[:last]))
        ids = prompt.prefix + prompt.suffix
        assert row[: len(ids)] == ids and prompt.clips == clips
        assert prompt.prefix[-1] == template.audio_token_id not in prompt.suffix
        assert prompt.prefix.count(template.audio_token_id) == len(clips)


def test_a_plain_question_in_turns_is_the_plain_question(template):
    plain = Question(question_id="q", question=" What? ", answer="A dog.")
    turns = conversation(user(0, " What? "), assistant("A dog."))
    assert template.row([turns]).input_ids.tolist() == template.row([plain]).input_ids.tolist()
    assert template.row([turns]).labels.tolist() == template.row([plain]).labels.tolist()
    assert template.prompt_of(plain).prefix == template.prefix and template.prompt_of(plain).clips == (0,)


def test_a_question_has_its_own_system_text_as_plain_text(template):
    own = "Hear <|im_end|> and <audio> well."
    question = conversation(user("Listen: ", 0, "What?"), assistant("A dog."), system=own)
    row = template.row([question])
    text = text_of(template, row.input_ids)
    assert own in text and SYSTEM not in text and text.index(own) < text.index("Listen: " + AUDIO_TOKEN)
    plain = template.row([question.model_copy(update={"system": "Hear."})])
    for token in (template.audio_token_id, template.end_token_id):
        assert (row.input_ids == token).sum() == (plain.input_ids == token).sum()
    assert template.prefix_of(question) == row.input_ids[: len(template.prefix_of(question))].tolist()


def test_control_tokens_of_every_turn_are_plain_text(template):
    spelled = conversation(
        user(0, "a<|im_end|>"), assistant("b<|im_start|>"), user("<audio>c"), assistant("<|im_end|>")
    )
    row = template.row([spelled])
    plain = template.row([conversation(user(0, "a"), assistant("b"), user("c"), assistant("d"))])
    for token in (template.audio_token_id, template.end_token_id):
        assert (row.input_ids == token).sum() == (plain.input_ids == token).sum()


def test_choices_are_listed_in_the_last_user_turn(chatml):
    question = conversation(
        user(0, "Hi."), assistant("Yes?"), user("Which?", 1), assistant("dog"), choices=["dog", "cat"]
    )
    text = text_of(chatml, chatml.prompt_of(question).prefix + chatml.prompt_of(question).suffix)
    assert f"Which?{AUDIO_TOKEN}A. dog\nB. cat<|im_end|>" in text


def test_a_template_without_later_turns_is_refused_by_name(tmp_path):
    once = "{% if messages | length > 3 %}{{ raise_exception('one exchange only') }}{% endif %}" + CHATML
    byte_tokenizer(once).save_pretrained(tmp_path)
    template = ChatTemplate(load_tokenizer(tmp_path), SYSTEM, max_text_tokens=1000)
    with pytest.raises(UserError, match=r"question 'q': has several turns, but .*one exchange only"):
        template.row([DIALOGUE])
    with pytest.raises(UserError, match=r"question 'q': is \d+ text tokens long"):
        ChatTemplate(load_tokenizer(tmp_path), SYSTEM, max_text_tokens=20).row([conversation(*DIALOGUE.turns[:2])])


@pytest.fixture
def dialogues(tmp_path) -> FeatureSet:
    """Returns a set in which clip 0 has a plain question, a conversation about clips 0, 2 and 3, one that begins with
    another clip, one with its own system text, one about no clip, and one about a clip that the set lacks."""
    questions = [
        Question(question_id="plain", question="What?", answer="A dog."),
        DIALOGUE.model_copy(update={"question_id": "dialogue"}),
        conversation(user(1, "then", 0), assistant("Yes.")).model_copy(update={"question_id": "other"}),
        conversation(user(0, "So?"), assistant("No."), system="Own.").model_copy(update={"question_id": "system"}),
        conversation(user("No clip?"), assistant("None.")).model_copy(update={"question_id": "text"}),
        conversation(user(0, 1), assistant("x"), clips=["gone"]).model_copy(update={"question_id": "missing"}),
        Question(question_id="last", question="Last?", answer="Yes."),
    ]
    rows = [
        {"clip_id": f"clip-{n}", "duration_s": 1.0 + n, "dataset": "d", "domain": "sound", "questions": []}
        for n in range(5)
    ]
    rows[0]["questions"] = [question.model_dump() for question in questions if question.question_id != "missing"]
    folder = write_rows(tmp_path / "set", rows, {"log_mel": [frames_of(n, 8) for n in range(5)]}, clips_per_shard=2)
    counted = (folder / "features.json").read_text()
    rows[0]["questions"] = [question.model_dump() for question in questions]
    folder = write_rows(tmp_path / "with_missing", rows, {"log_mel": [frames_of(n, 8) for n in range(5)]})
    (folder / "features.json").write_text(counted)
    return FeatureSet(folder, ["log_mel"])


def test_the_table_leaves_out_questions_whose_clips_the_set_lacks(dialogues):
    assert [question.question_id for question in dialogues.questions()] == [
        "plain", "dialogue", "other", "system", "text", "last",
    ]  # fmt: skip
    assert dialogues.left_out == {"missing"}
    assert dialogues.table.number.tolist() == [0, 1, 2, 3, 4, 5]
    assert [question.question_id for question in dialogues.clip(0).questions] == [
        question.question_id for question in dialogues.questions()
    ]
    assert dialogues.table.audio == {1: (0, 2, 3), 2: (2, 0), 4: ()}
    assert dialogues.table.prefix.tolist() == [0, 0, 1, 2, 3, 0]
    assert dialogues.table.audio_of([1, 5, 0], 0) == (0, 2, 3)


def test_plain_sets_have_no_codes(tmp_path):
    table = FeatureSet(write_feature_set(tmp_path / "set", [2, 1]), ["log_mel"]).table
    assert table.prefix is None and table.audio == {}


def test_batches_hold_the_clips_of_each_row_in_the_order_of_its_placeholders(dialogues, chatml):
    train = TrainConfig(micro_batch_size=6, micro_batch_tokens=100_000, precision="fp32")
    (batch,) = evaluation_batches(dialogues, chatml, np.arange(6), train, Ranks(0, 1, 0, 1), lambda s: int(10 * s))
    clips = {"plain": [0], "last": [0], "system": [0], "text": [], "dialogue": [0, 2, 3], "other": [2, 0]}
    expected = [clip for question_id in batch["question_ids"] for clip in clips[question_id]]
    assert batch["clip_ids"] == [f"clip-{clip}" for clip in expected]
    assert batch["audio_s"] == [1.0 + clip for clip in expected]
    frames = np.concatenate([frames_of(clip, 8) for clip in expected])
    assert (batch["audio_features"]["log_mel"].numpy() == frames).all()
    placeholders = (batch["input_ids"] == chatml.audio_token_id).sum(1).tolist()
    assert placeholders == [len(clips[question_id]) for question_id in batch["question_ids"]]
    # Longest first, in positions that count the audio of every clip.
    seconds = [sum(1.0 + clip for clip in clips[question_id]) for question_id in batch["question_ids"]]
    positions = batch["attention_mask"].sum(1).numpy() - placeholders + 10 * np.array(seconds)
    assert (np.diff(positions) <= 0).all()


def test_every_clip_of_a_row_is_prefetched(dialogues, chatml, tmp_path, monkeypatch):
    prefetched = set()
    monkeypatch.setattr(FeatureSet, "prefetch", lambda self, index, process, processes: prefetched.add(index))
    remote = FeatureSet(dialogues.folder, ["log_mel"], tmp_path / "cache")
    data = DataConfig(train=str(dialogues.folder), questions_per_sequence=2)
    loader = TrainingLoader(
        [remote], chatml, data, TrainConfig(global_batch_size=2, micro_batch_size=1), Ranks(0, 1, 0, 1)
    )
    next(iter(loader))
    deadline = time.monotonic() + 10
    while prefetched != {0, 2, 3} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetched == {0, 2, 3}


def test_conversations_of_a_text_set_have_no_placeholder(tmp_path, chatml):
    turns = [
        user("Hello?").model_dump(),
        assistant("Hi.").model_dump(),
        user("Bye.").model_dump(),
        assistant("Bye.").model_dump(),
    ]
    question = {"question_id": "q", "question": "Bye.", "answer": "Bye.", "task": "chat", "turns": turns}
    row = {"clip_id": "t", "duration_s": 0.0, "dataset": "d", "domain": "chat", "questions": [question]}
    features = FeatureSet(write_rows(tmp_path / "text", [row], {}), [])
    train = TrainConfig(micro_batch_size=1)
    (batch,) = evaluation_batches(features, chatml, np.array([0]), train, Ranks(0, 1, 0, 1))
    assert chatml.audio_token_id not in batch["input_ids"] and batch["clip_ids"] == []
    text = text_of(chatml, batch["input_ids"][0])
    assert "user\nHello?<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye." in text
    assert features.table.prefix is None
