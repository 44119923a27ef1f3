"""Clips that take, with their text, more positions than the language model was made for."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ExperimentConfig, validate_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.data.chat_template import build_chat_template
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.training.build import check_questions
from tests.helpers.feature_sets import write_rows


@pytest.mark.parametrize("integration", ["lal", "plits"])
@pytest.mark.parametrize(("seconds", "fits"), [(100.0, True), (200.0, False)])
def test_training_refuses_a_clip_that_is_too_long(tmp_path: Path, integration: str, seconds: float, fits: bool) -> None:
    question = {"question_id": "q", "question": "What?", "answer": "a dog", "task": "what"}
    row = {"clip_id": "c", "duration_s": seconds, "dataset": "d", "domain": "sound", "questions": [question]}
    write_rows(tmp_path / "set", [row], {"log_mel": [np.zeros((4, 8), np.float16)]})
    sizes = RandomLanguageModel(hidden_size=16, intermediate_size=16, num_layers=2, num_heads=1, num_key_value_heads=1)
    save_random_language_model(tmp_path / "lm", ["What? a dog"], sizes)  # made for 4,096 positions
    values = {
        "output": str(tmp_path / "run"),
        "model": {"language_model": str(tmp_path / "lm"), "encoders": ["log_mel"], "integration": integration},
        "data": {"train": str(tmp_path / "set"), "system_prompt": "Listen."},
        "train": {"steps": 1},
    }
    config = validate_config(ExperimentConfig, values, "test")
    _, chat_template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    question_tokens = next(after for _, after in chat_template.token_counts([Question.model_validate(question)]))
    positions = len(chat_template.prefix) - 1 + 5000 + question_tokens
    if fits:
        assert check_questions(config, chat_template).num_unfit == 0
        return
    with pytest.raises(UserError, match=f"takes {positions} positions with its audio, more than the 4096"):
        check_questions(config, chat_template)
