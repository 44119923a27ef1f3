"""A small language model with random weights and its own tokenizer, saved in the Hugging Face format.

The demo, the scaling experiments and the tests use it in place of a pretrained Llama: nothing is downloaded, and it is
loaded, trained and exported by the same code as a pretrained model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (  # ChatML, as in Qwen
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class RandomLanguageModel:
    """Sizes and seed of a language model with random weights.

    Attributes:
        model_type: any decoder type of transformers (`llama`, `qwen2`, `qwen3`, ...).
        vocab_size: largest size of the vocabulary; a small corpus of texts fills less.
        initializer_range: standard deviation of the weights; None means the default of the type (0.02 for Llama). Small
            models learn to look up earlier words several times sooner from about 1 / sqrt(hidden_size).
        seed: random seed of the weights; the same seed and texts give the same files.
    """

    model_type: str = "llama"
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_key_value_heads: int = 2
    vocab_size: int = 1024
    initializer_range: float | None = None
    seed: int = 0


def save_random_language_model(folder: str | Path, texts: Iterable[str], settings: RandomLanguageModel) -> None:
    """Trains a byte-level BPE tokenizer on `texts` and saves it beside a randomly initialised decoder."""
    tokenizer = _train_tokenizer(texts, settings.vocab_size)
    config = AutoConfig.for_model(
        settings.model_type,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({} if settings.initializer_range is None else {"initializer_range": settings.initializer_range}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
