"""Conversations of several turns and clips, from the chat template to the model, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.feature_contract import Question, Turn
from pipeline.core.labels import IGNORE_INDEX
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.data.collate import Batch, Example, collate
from pipeline.data.conversation import Row
from pipeline.data.feature_set import Clip
from pipeline.model import PalForCausalLM
from tests.helpers.feature_sets import byte_tokenizer
from tests.helpers.small_models import WIDTHS, build
from tests.parity.float64 import lifted_to_float64

PRESETS = ["plits", "lal", "pal_v2", "pal_v3", "flamingo"]
FRAMES = [5, 3, 4]
NEW = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def question(number: int, *turns: Turn) -> Question:
    text = "".join(part for part in turns[-2].content if isinstance(part, str))
    answer = str(turns[-1].content[0])
    return Question(question_id=f"q{number}", question=text, answer=answer, turns=list(turns), clips=["one", "two"])


def user(*content: str | int) -> Turn:
    return Turn(role="user", content=list(content))


def assistant(text: str) -> Turn:
    return Turn(role="assistant", content=[text])


DIALOGUE = question(
    0,
    user(0, "And ", 1, "?"),
    assistant("A dog."),
    user("Now", 2, "."),
    assistant("Two."),
    user("Why?"),
    assistant("So."),
)
OTHERS = [
    question(1, user(0, "One?"), assistant("Yes."), user(2, "or", 1), assistant("No.")),
    Question(question_id="q2", question="Plain?", answer="It is."),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return ChatTemplate(load_tokenizer(folder), "Hear.", max_text_tokens=500)


def model_for(preset: str, template: ChatTemplate) -> PalForCausalLM:
    with lifted_to_float64():
        model = build(preset, language_model={"vocab_size": 300}).double()  # type: ignore[arg-type]
    model.config.audio_token_id = template.audio_token_id
    return model


def features(clip: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(clip)
    return {name: rng.standard_normal((FRAMES[clip], width)).astype(np.float16) for name, width in WIDTHS.items()}


def batch_of(rows: Sequence[tuple[Row, Sequence[int]]], template: ChatTemplate) -> Batch:
    """Collates rows, each with the clips of its placeholders."""
    clips = [Clip(f"clip-{number}", 1.0, "", "", ()) for number in range(len(FRAMES))]
    examples = [
        Example(row, (), clips[first], features(first), [(clips[other], features(other)) for other in others])
        for row, (first, *others) in rows
    ]
    batch = collate(examples, pad_token_id=template.pad_token_id, widths=WIDTHS, feature_dtype=torch.float32)
    names = ("input_ids", "attention_mask", "labels", "segment_ids", "audio_features", "audio_lengths")
    return {name: batch[name] for name in names}


def gradients(model: PalForCausalLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the summed loss and the gradients of all parameters."""
    batch = {**batch, "audio_features": {name: x.double() for name, x in batch["audio_features"].items()}}
    model.zero_grad()
    encoders = {name for stream in model.specs for name in stream.encoders}
    for name in ("audio_features", "audio_lengths"):
        batch[name] = {encoder: x for encoder, x in batch[name].items() if encoder in encoders}
    with lifted_to_float64():
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cut(row: Row, start: int, end: int) -> Row:
    """Returns the row up to `end` with the labels from `start` on."""
    labels = row.labels[:end].copy()
    labels[:start] = IGNORE_INDEX
    return Row(row.input_ids[:end], labels, row.segment_ids[:end])


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_of_a_dialogue_are_the_sum_over_its_answers(preset: str, template: ChatTemplate) -> None:
    model, row = model_for(preset, template), template.row([DIALOGUE])
    labelled = row.labels != IGNORE_INDEX
    starts = [i for i in range(1, len(labelled)) if labelled[i] and not labelled[i - 1]]
    ends = [i + 1 for i in range(len(labelled)) if labelled[i] and (i + 1 == len(labelled) or not labelled[i + 1])]
    assert [template.decode(row.input_ids[s:e].tolist()) for s, e in zip(starts, ends, strict=True)] == [
        "A dog.",
        "Two.",
        "So.",
    ]
    loss, grads = gradients(model, batch_of([(row, (0, 1, 2))], template))
    parts = []
    for start, end in zip(starts, ends, strict=True):
        part = cut(row, start, end)
        clips = tuple(range(int((part.input_ids == template.audio_token_id).sum())))
        parts.append(gradients(model, batch_of([(part, clips)], template)))
    torch.testing.assert_close(loss, sum(part[0] for part in parts), **CLOSE)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, sum(part[1][name] for part in parts), **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_conversations_equal_unpacked_ones(preset: str, template: ChatTemplate) -> None:
    model = model_for(preset, template)
    packed = template.row([DIALOGUE, *OTHERS])
    clips = [template.prompt_of(each).clips for each in (DIALOGUE, *OTHERS)]
    assert clips == [(0, 1, 2), (0, 2, 1), (0,)]
    together = gradients(model, batch_of([(packed, (0, 1, 2, 2, 1))], template))
    separate = [(template.row([each]), indices) for each, indices in zip((DIALOGUE, *OTHERS), clips, strict=True)]
    loss, grads = gradients(model, batch_of(separate, template))
    torch.testing.assert_close(together[0], loss, **CLOSE)
    for name, gradient in grads.items():
        torch.testing.assert_close(together[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_cached_decoding_of_each_turn_equals_the_full_forward(preset: str, turn: int, template: ChatTemplate) -> None:
    model = model_for(preset, template)
    assert DIALOGUE.turns is not None
    prompt = template.prompt_of(question(0, *DIALOGUE.turns[: 2 * turn]))
    assert prompt.prefix[-1] == template.audio_token_id not in prompt.suffix
    whole = template.row([DIALOGUE]).input_ids.tolist()
    assert whole[: len(prompt.prefix + prompt.suffix)] == prompt.prefix + prompt.suffix
    encoders = {name for stream in model.specs for name in stream.encoders}
    audio = {
        name: torch.cat([torch.from_numpy(features(clip)[name]).double() for clip in prompt.clips]) for name in encoders
    }
    lengths = {name: torch.tensor([FRAMES[clip] for clip in prompt.clips]) for name in encoders}
    ids = prompt.prefix + prompt.suffix
    with lifted_to_float64(), torch.no_grad():
        prefix = model.prefill(torch.tensor([prompt.prefix]), None, audio, lengths)
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        generated = model.generate_from_prefix(prefix, torch.tensor([0]), torch.tensor([prompt.suffix]), **settings)
        for _ in range(NEW):
            logits = model(torch.tensor([ids]), audio_features=audio, audio_lengths=lengths).logits
            ids.append(int(logits[0, -1].argmax()))
    assert generated[0].tolist() == ids[-NEW:]
