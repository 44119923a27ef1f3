"""Answers depend on model and features alone; a model that hears fails on other clips' audio; foreign features are
refused."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_sets import write_feature_set, write_rows
from pipeline.answering import Answerer, Request
from pipeline.data.chat import AUDIO_TOKEN, Chat, load_tokenizer
from pipeline.data.collate import Example, collate
from pipeline.data.shards import FeatureSet
from pipeline.errors import UserError
from pipeline.evaluate import _spread, ask, commonest_answers, evaluate, swap_within_domains
from pipeline.features import CLIP_COLUMNS, CLIPS
from pipeline.model import PalForCausalLM
from pipeline.model.scratch import save_scratch_language_model
from pipeline.streams import Connector, preset_streams

SOUNDS = ("dog", "cat", "bell")
CLIPS_IN_SET = 9
SYSTEM_PROMPT = "Listen."


def write_set(folder: Path) -> Path:
    """Clips of three sounds, told apart by their features and by nothing in the questions."""
    rows, frames = [], []
    for number in range(CLIPS_IN_SET):
        sound = SOUNDS[number % 3]
        questions = [
            {"question": "What is it?", "answer": sound, "task": "what"},
            {"question": "Is it a dog?", "answer": "yes" if sound == "dog" else "no", "task": "verify"},
        ]
        rows.append(
            {
                "clip_id": f"clip-{number}",
                "duration_s": 1.0 + number % 4,
                "dataset": "synth",
                "domain": "sound" if number < 6 else "music",
                "questions": [{"question_id": f"{number}/{i}", **question} for i, question in enumerate(questions)],
            }
        )
        frames.append(np.zeros((3 + number % 4, 8), np.float16))
        frames[-1][:, number % 3] = 2
    return write_rows(folder, rows, {"log_mel": frames})


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    return FeatureSet(write_set(tmp_path_factory.mktemp("sets") / "held-out"), ["log_mel"])


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory, features: FeatureSet) -> Answerer:
    """A tiny LAL model that has learned the set by heart."""
    folder = tmp_path_factory.mktemp("language_model")
    texts = [f"{q.question} {q.answer}" for clip in range(3) for q in features.clip(clip).questions]
    save_scratch_language_model(folder, texts * 5, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer, SYSTEM_PROMPT, max_text_tokens=128)
    torch.manual_seed(0)
    model = PalForCausalLM.from_language_model(
        str(folder),
        streams=preset_streams("lal", ["log_mel"], 2, connector=Connector()),
        encoder_widths=features.widths,
        audio_token_id=chat.audio_token_id,
        feature_fingerprints={"log_mel": features.contract.encoders["log_mel"].fingerprint},
    )
    examples = []
    for number in range(CLIPS_IN_SET):
        clip = features.clip(number)
        arrays = features.features(number, clip.clip_id)
        examples += [Example(chat.row([question]), [question], clip, arrays) for question in clip.questions]
    batch = collate(examples, pad_token_id=chat.pad_token_id, widths=features.widths, feature_dtype=torch.float32)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels", "audio_features", "audio_lengths")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in count():
        loss = model(**inputs).loss
        if loss < 0.01:
            break
        assert step < 300, "does not learn"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Answerer(model, chat, max_new_tokens=16)


def test_x(answerer, features):
    print(ask(answerer, features, {0:0,1:1}, 4))
