"""Tests that the random language model loads with transformers' own classes and depends on its seed alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model

TEXTS = ["which sound comes first?", "a beep", "transcribe the syllables", "ka mi to"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_loads_from_pretrained(tmp_path: Path, model_type: str) -> None:
    settings = RandomLanguageModel(model_type=model_type, hidden_size=24, num_heads=2, num_layers=2)
    save_random_language_model(tmp_path, TEXTS, settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == model_type
    messages = [{"role": "user", "content": "a beep, über?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), model.config.vocab_size)


def test_same_seed_gives_same_weights_regardless_of_the_global_random_state(tmp_path: Path) -> None:
    for name, burn in (("a", 0), ("b", 7)):
        torch.rand(burn)
        settings = RandomLanguageModel(hidden_size=24, num_heads=2, num_layers=2, seed=5)
        save_random_language_model(tmp_path / name, TEXTS, settings)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_spread_of_the_weights_follows_the_setting(tmp_path: Path) -> None:
    for name, spread in (("default", None), ("wide", 0.1)):
        settings = RandomLanguageModel(hidden_size=96, num_heads=2, num_layers=1, initializer_range=spread)
        save_random_language_model(tmp_path / name, TEXTS, settings)
    spreads = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[0].mlp.up_proj.weight.std().item()
        for name in ("default", "wide")
    }
    assert spreads == pytest.approx({"default": 0.02, "wide": 0.1}, rel=0.05)
