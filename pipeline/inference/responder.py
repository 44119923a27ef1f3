"""Loads an exported model and generates answers to questions about clips, greedily. Does not score them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from pipeline.config import ExperimentConfig
from pipeline.core.console import logger
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.streams import IntegrationKind
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.data.conversation import Prompt
from pipeline.data.length_errors import prompt_too_long, too_many_positions
from pipeline.inference.decoding import greedy_decoding
from pipeline.inference.token_streamer import TokenStreamer
from pipeline.model import AttentionMass, PalConfig, PalForCausalLM, PrefixCache, StreamingAudio, probe_attention
from pipeline.training.exported_model import load_model, read_model_config, read_training_config

Features = Mapping[str, NDArray[np.float16]]


@dataclass(frozen=True)
class Reply:
    """A generated answer.

    Attributes:
        text: text of the answer.
        truncated: whether the bound on new tokens ended it, not the model.
    """

    text: str
    truncated: bool


@dataclass(frozen=True)
class Answer:
    """One answer and its speed.

    Attributes:
        question, answer: their texts.
        tokens: generated tokens.
        first_token_s: seconds until the first token.
        tokens_per_s: rate after the first token; None for an answer of one token.
        truncated: whether the bound on new tokens ended the answer, not the model.
    """

    question: str
    answer: str
    tokens: int
    first_token_s: float
    tokens_per_s: float | None
    truncated: bool


def load_config_of(folder: Path) -> tuple[ExperimentConfig, PalConfig]:
    """Reads how an exported model was trained and its model config; reads no weights. Accepts a plain language model.

    Raises:
        UserError: the folder is not an exported model.
    """
    config = read_training_config(folder)
    return config, read_model_config(folder, config)


def require_streams(folder: Path, config: ExperimentConfig) -> None:
    """Checks that a model reads audio.

    Args:
        folder: folder of the model.
        config: how it was trained.

    Raises:
        UserError: it was trained on text alone.
    """
    if config.model.text_only:
        remedy = f"train a model that reads audio from it (model.language_model={folder}), or evaluate it on text"
        raise UserError(folder, "is a language model that was trained on text alone", remedy)


def load_responder(folder: Path, max_new_tokens: int, number: int = 0) -> Responder:
    """Loads an exported model with the prompt that it was trained with, onto a GPU where there is one.

    Args:
        folder: folder of the exported model.
        max_new_tokens: maximum length of an answer.
        number: index of this process among those that share the GPUs.

    Raises:
        UserError: the folder is not an exported model.
    """
    config, _ = load_config_of(folder)
    model = load_model(folder, config)
    # Not data.max_text_tokens, which bounds training: a benchmark's prompts may be longer, up to the model's own limit.
    max_text_tokens = model.config.language_model.max_position_embeddings
    chat_template = ChatTemplate(
        load_tokenizer(folder), config.data.system_prompt, max_text_tokens=max_text_tokens, length_error=prompt_too_long
    )
    device = f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return Responder(model.to(device), chat_template, max_new_tokens)


class Responder:
    """Generates answers with one model on its device.

    Args:
        max_new_tokens: maximum length of an answer; also an attribute.

    Attributes:
        model: in evaluation mode.
        chat_template: renders the prompts.
        max_positions: positions that the language model was made for.
        feature_fingerprints: encoder -> fingerprint of the features that the model was trained on.
    """

    def __init__(self, model: PalForCausalLM, chat_template: ChatTemplate, max_new_tokens: int) -> None:
        self.model = model.eval()
        self.chat_template = chat_template
        self.max_new_tokens = max_new_tokens
        self._warned_of_positions = False
        self.max_positions: int = model.config.language_model.max_position_embeddings
        self.feature_fingerprints: dict[str, str] = model.config.feature_fingerprints

    def prefill(self, clips: Sequence[Features], hidden: Collection[IntegrationKind] = ()) -> PrefixCache:
        """Prefills the prefix of plain questions with each of these clips, for any number of questions.

        Args:
            hidden: integrations whose audio tokens are masked from the language model.
        """
        return self.prefill_prompts([self.chat_template.prefix] * len(clips), clips, range(len(clips)), hidden)

    @torch.inference_mode()
    def prefill_prompts(
        self,
        prefixes: Sequence[Sequence[int]],
        clips: Sequence[Features],
        placeholders: Sequence[int],
        hidden: Collection[IntegrationKind] = (),
    ) -> PrefixCache:
        """Prefills the prefixes of prompts, a row each; encodes each clip once.

        Args:
            prefixes: token ids up to the last placeholder; without a placeholder those before the question.
            placeholders: index of the clip at each placeholder of the prefixes, row by row.
            hidden: see `prefill`.
        """
        device, longest = self.model.device, max(1, *map(len, prefixes))
        pad = self.chat_template.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prefix)) + list(prefix) for prefix in prefixes], device=device)
        mask = None
        if any(len(prefix) < longest for prefix in prefixes):
            rows = [[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes]
            mask = torch.tensor(rows, device=device)
        in_order = list(placeholders) == list(range(len(clips)))
        audio = self._audio(clips) if clips else ({}, {})
        numbers = None if in_order else torch.tensor(placeholders, dtype=torch.long)
        return self.model.prefill(ids, mask, *audio, clips=numbers, hidden=hidden)

    @torch.inference_mode()
    def prefill_stream(self, audio: StreamingAudio, hidden: Collection[IntegrationKind] = ()) -> PrefixCache:
        """Prefills the prompt's prefix with the retained audio of a stream; valid until the stream receives more audio.

        Args:
            hidden: see `prefill`.
        """
        ids = torch.tensor([self.chat_template.prefix], device=self.model.device)
        return self.model.prefill_audio_kv(ids, None, audio, hidden=hidden)

    @torch.inference_mode()
    def answer(
        self,
        prefix: PrefixCache,
        questions: Sequence[str | Question],
        rows: Sequence[int],
        streamer: BaseStreamer | None = None,
    ) -> list[Reply]:
        """Generates the answers to one batch with `greedy_decoding`.

        Args:
            prefix: prefix cache from `prefill`, `prefill_prompts` or `prefill_stream`.
            questions: questions whose prompts begin as the prefix cache does; of plain ones their texts are enough.
            rows: row of each question's clip in the prefix cache.
            streamer: receives each token when it is generated; for a single question.

        Raises:
            UserError: a question is too long, or contains a mark of the chat template.
        """
        suffixes = [self._suffix(question) for question in questions]
        ends = (prefix.next_position.cpu()[list(rows)] + torch.tensor([len(ids) for ids in suffixes])).tolist()
        names = [question if isinstance(question, str) else question.question_id for question in questions]
        self._warn_of_positions(dict(zip(names, ends, strict=True)))
        longest = max(map(len, suffixes))
        device, pad = self.model.device, self.chat_template.pad_token_id
        input_ids = [[pad] * (longest - len(ids)) + ids for ids in suffixes]
        attention_mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in suffixes]
        generated = self.model.generate_from_prefix(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(attention_mask, device=device),
            prefix=prefix,
            prefix_rows=torch.tensor(rows, device=device),
            generation_config=GenerationConfig(
                **greedy_decoding(self.max_new_tokens), eos_token_id=self.chat_template.end_token_id, pad_token_id=pad
            ),
            use_model_defaults=False,  # transformers would replace the settings that equal its global defaults
            streamer=streamer,
        )
        end = self.chat_template.end_token_id
        return [Reply(self.chat_template.decode(ids), truncated=end not in ids) for ids in generated.tolist()]

    def prompt_of(self, question: Question, *, has_audio: bool = True) -> Prompt:
        """Returns the prompt of a question, in which earlier answers are those of its turns.

        Args:
            has_audio: False omits the placeholders: for a set of text, or for the model's answers without any audio.
        """
        prompt, placeholder = self.chat_template.prompt_of(question), self.chat_template.audio_token_id
        return prompt if has_audio else Prompt([i for i in prompt.prefix if i != placeholder], prompt.suffix, ())

    def _warn_of_positions(self, positions: Mapping[str, int]) -> None:
        """Warns once if a prompt takes more positions than the language model has.

        Args:
            positions: question -> positions of its prompt with the audio.
        """
        question, longest = max(positions.items(), key=lambda item: item[1])
        if longest > self.max_positions and not self._warned_of_positions:
            logger.warning(too_many_positions(f"question '{question}'", longest, self.max_positions))
            self._warned_of_positions = True

    def _suffix(self, question: str | Question) -> list[int]:
        if isinstance(question, str):
            question = Question(question_id=question, question=question, answer="")
        return self.chat_template.prompt_of(question).suffix

    def answer_streaming(self, prefix: PrefixCache, question: str | Question, write: Callable[[str], None]) -> Answer:
        """Answers one question about the first row of `prefix`; calls `write` with each new piece of text.

        Raises:
            UserError: see `answer`.
        """
        streamer = TokenStreamer(self.chat_template, write)
        start = time.perf_counter()
        (reply,) = self.answer(prefix, [question], [0], streamer=streamer)
        first, last, tokens = streamer.times_s[0], streamer.times_s[-1], len(streamer.times_s)
        tokens_per_s = (tokens - 1) / (last - first) if tokens > 1 else None
        text = question if isinstance(question, str) else question.question
        return Answer(text, reply.text, tokens, first - start, tokens_per_s, reply.truncated)

    def attention_mass(self, clips: Sequence[Features], question: Question) -> AttentionMass:
        """Measures which parts of clips and text the tokens that predict the last answer of a question attend to.

        Args:
            clips: clip of the question, then those of `Question.clips`.

        Raises:
            UserError: the conversation is too long, or the model has flamingo streams.
        """
        if question.turns is not None:
            history = [turn.model_copy(update={"loss": False}) for turn in question.turns[:-1]]
            last = question.turns[-1].model_copy(update={"loss": True})
            question = question.model_copy(update={"turns": [*history, last]})
        row = self.chat_template.row([question])
        ids, labels = (torch.from_numpy(x)[None].to(self.model.device) for x in (row.input_ids, row.labels))
        placeholders = self.chat_template.prompt_of(question).clips
        audio = self._audio([clips[number] for number in placeholders]) if placeholders else ({}, {})
        return probe_attention(self.model, ids, labels, *audio)

    def attention_over_time(self, attention: AttentionMass) -> dict[str, NDArray[np.float32]]:
        """Returns pathway -> attention to each of its audio tokens, in temporal order, summed over layers.

        Omits streams whose tokens do not correspond to times in the clip (`qformer`).
        """
        curves: dict[str, NDArray[np.float32]] = {}
        for spec, weights_LN in zip(self.model.specs, attention.token_weights, strict=True):
            if spec.connector.kind != "qformer":
                name = f"{spec.integration} ({', '.join(spec.encoders)})"
                curves[name] = weights_LN.sum(0).numpy()
        return curves

    def _audio(self, clips: Sequence[Features]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns encoder -> (total frames, width) on the model's device, and encoder -> (clips,) lengths."""
        names = self.feature_fingerprints
        lengths = {name: torch.tensor([len(clip[name]) for clip in clips]) for name in names}
        frames = {name: torch.from_numpy(np.concatenate([clip[name] for clip in clips])) for name in names}
        return {name: x.to(self.model.device, self.model.dtype) for name, x in frames.items()}, lengths
