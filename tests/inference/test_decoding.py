"""Decoding of answers: greedy, whatever the language model's `generation_config.json` asks for."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from pipeline.core.streams import Connector, preset_streams
from pipeline.inference.decoding import greedy_decoding
from pipeline.inference.responder import Reply, Responder
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.model.random_lm import RandomLanguageModel, save_random_language_model
from tests.helpers.byte_responders import build_responder

PUBLISHED: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 5.0},
    "shortest answer": {"min_new_tokens": 12, "min_length": 3},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "n-grams": {"no_repeat_ngram_size": 1},
    "forced end": {"forced_eos_token_id": 7},
    "sampling": {"do_sample": True, "temperature": 0.01, "top_p": 0.5, "top_k": 3},
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "length": {"max_length": 3},
    "returned sequences": {"num_beams": 2, "num_return_sequences": 2},
    "output": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.fixture(scope="module")
def responder(tmp_path_factory: pytest.TempPathFactory) -> Responder:
    return build_responder(tmp_path_factory.mktemp("tokenizer"), "lal", max_new_tokens=16)


def replies_of(responder: Responder, settings: dict[str, Any]) -> list[Reply]:
    published = GenerationConfig()
    published.update(**settings)
    responder.model.generation_config = published
    clip = {"log_mel": np.ones((4, 8), np.float16)}
    return responder.answer(responder.prefill([clip]), ["What?", "How many dogs?"], [0, 0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_generation_config_changes_no_answer(responder: Responder, name: str) -> None:
    expected = replies_of(responder, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replies_of(responder, PUBLISHED[name]) == expected


def test_tokens_that_a_published_generation_config_forbids_are_generated(responder: Responder) -> None:
    expected = replies_of(responder, {})
    every_token = list(range(responder.model.config.language_model.vocab_size - 1))
    for settings in (
        {"suppress_tokens": every_token},
        {"begin_suppress_tokens": every_token},
        {"bad_words_ids": [[token] for token in every_token]},
        {"eos_token_id": every_token},
        {"stop_strings": ["a"]},
    ):
        assert replies_of(responder, settings) == expected


def test_an_exported_model_has_no_settings_of_decoding_but_token_ids(tmp_path: Path) -> None:
    save_random_language_model(tmp_path / "lm", ["What is it?"], RandomLanguageModel(hidden_size=24))
    published = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "max_length": 4096, "eos_token_id": 2}
    (tmp_path / "lm" / "generation_config.json").write_text(json.dumps(published))
    language_model = AutoConfig.from_pretrained(tmp_path / "lm")
    streams = preset_streams("lal", ["log_mel"], 6, connector=Connector())
    config = PalConfig(language_model, streams, {"log_mel": 8}, 999, base_language_model=str(tmp_path / "lm"))
    model = PalForCausalLM.from_language_model(config)
    model.save_pretrained(tmp_path / "model")  # transformers refuses to save a temperature without sampling
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {name for name in saved if not name.startswith(("_", "transformers"))} <= {"eos_token_id", "pad_token_id"}
    assert saved["eos_token_id"] == 2


def test_the_settings_of_decoding_are_plain_json() -> None:
    expected = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 7}
    assert json.loads(json.dumps(greedy_decoding(7))) == expected
    assert GenerationConfig(**greedy_decoding(7)).to_diff_dict().keys() - {"transformers_version"} == {"max_new_tokens"}


def test_an_answer_without_an_end_token_is_truncated(responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
    template = responder.chat_template
    end, pad = template.end_token_id, template.pad_token_id
    ids = torch.tensor([[70, 71, 72], [70, 71, end], [70, end, pad], [end, pad, pad]])
    monkeypatch.setattr(responder.model, "generate_from_prefix", lambda **_: ids)
    clip = {"log_mel": np.ones((4, 8), np.float16)}
    replies = responder.answer(responder.prefill([clip]), ["What?"] * 4, [0] * 4)
    assert [reply.truncated for reply in replies] == [True, False, False, False]
    assert replies[3].text == ""
