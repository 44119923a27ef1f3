"""Clips that take more positions than the language model was made for."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ExperimentConfig, validate_config
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import FeatureSet
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from pipeline.training.build import warn_of_long_clips
from tests.helpers.feature_sets import write_rows
from tests.helpers.log_lines import log_lines


@pytest.mark.parametrize("integration", ["lal", "plits"])
@pytest.mark.parametrize(("seconds", "warns"), [(100.0, False), (200.0, True)])
def test_training_warns_of_the_longest_clip(tmp_path: Path, integration: str, seconds: float, warns: bool) -> None:
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
    with log_lines() as lines:
        warn_of_long_clips(config, FeatureSet(tmp_path / "set", ["log_mel"]), chat_template)
    expected = f"the longest clip (200 s) takes {len(chat_template.prefix) - 1 + 5000} positions, more than the 4096"
    assert [expected in line for line in lines] == [True] * warns
