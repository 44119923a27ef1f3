"""Responders of small random models that read and write bytes, so that every answer depends on all that is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from pipeline.core.feature_contract import Question
from pipeline.core.streams import Connector, Preset, preset_streams
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.inference.responder import Features, Responder
from pipeline.model import PalConfig, PalForCausalLM
from tests.helpers.feature_sets import byte_tokenizer

WIDTH = 8


def build_responder(folder: Path, preset: Preset, max_new_tokens: int = 5) -> Responder:
    """Returns a responder for features of `log_mel` with WIDTH values; writes its tokenizer to a folder."""
    byte_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    language_model = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
    )
    streams = preset_streams(preset, ["log_mel"], 3, connector=Connector())
    audio_token_id = tokenizer.convert_tokens_to_ids("<audio>")
    config = PalConfig(
        language_model, streams, {"log_mel": WIDTH}, audio_token_id, feature_fingerprints={"log_mel": "fingerprint"}
    )
    model = PalForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Responder(model, ChatTemplate(tokenizer, "Listen.", max_text_tokens=2000), max_new_tokens)


def full_answer(responder: Responder, question: Question, clips: list[Features]) -> str:
    """Returns the answer to a whole conversation that is read in one pass, without a prefix cache.

    Args:
        clips: clip of the question, then those of `Question.clips`.
    """
    prompt = responder.chat_template.prompt_of(question)
    features = [torch.from_numpy(clips[number]["log_mel"].astype(np.float32)) for number in prompt.clips]
    generated = responder.model.generate(
        torch.tensor([prompt.prefix + prompt.suffix]),
        None,
        {"log_mel": torch.cat(features)} if features else {},
        {"log_mel": torch.tensor([len(x) for x in features])} if features else {},
        max_new_tokens=responder.max_new_tokens,
        do_sample=False,
        eos_token_id=responder.chat_template.end_token_id,
        pad_token_id=responder.chat_template.pad_token_id,
    )
    return responder.chat_template.decode(generated[0].tolist())
