"""An exported model that answers questions about clips. Owns loading and greedy generation; scores nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.streams import IntegrationKind
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.model import AttentionMass, PalConfig, PalForCausalLM, PrefixCache, StreamingAudio, probe_attention
from pipeline.training import run_dir

Features = Mapping[str, NDArray[np.float16]]


@dataclass(frozen=True)
class Answer:
    """What was answered to one question, and how fast: until the first token, and after it."""

    question: str
    answer: str
    tokens: int
    first_token_s: float
    tokens_per_s: float | None


def load_config_of(folder: Path) -> tuple[ExperimentConfig, PalConfig]:
    """How an exported model was trained, and what it is made of; reads no weights.

    Raises:
        UserError: the folder is not an exported model.
    """
    if not (folder / run_dir.CONFIG).is_file():
        fault = "is not an exported model" if folder.is_dir() else "does not exist"
        raise UserError(folder, fault, "give the folder `model` of a run, or one made by `pal export`")
    return load_config(ExperimentConfig, folder / run_dir.CONFIG), PalConfig.from_pretrained(folder)


def load_responder(folder: Path, max_new_tokens: int, number: int = 0) -> Responder:
    """The model of an exported folder, on a GPU where there is one, with the prompt that it was trained with.

    Args:
        number: of this process among those that share the GPUs.

    Raises:
        UserError: the folder is not an exported model.
    """
    config, _ = load_config_of(folder)
    model = PalForCausalLM.from_pretrained(folder, dtype="auto")
    # What training was bounded by says nothing of a benchmark's longer prompts: the language model's own bound counts.
    longest = model.config.language_model.max_position_embeddings
    chat = ChatTemplate(load_tokenizer(folder), config.data.system_prompt, max_text_tokens=longest)
    device = f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return Responder(model.to(device), chat, max_new_tokens)


class Responder:
    """A model, its prompt and its device.

    Attributes:
        model: in evaluation mode.
        chat: writes its prompts.
        feature_fingerprints: encoder -> fingerprint of the features that the model understands.
    """

    def __init__(self, model: PalForCausalLM, chat: ChatTemplate, max_new_tokens: int) -> None:
        self.model = model.eval()
        self.chat = chat
        self._max_new_tokens = max_new_tokens
        self.feature_fingerprints: dict[str, str] = model.config.feature_fingerprints

    @torch.inference_mode()
    def prefill(self, clips: Sequence[Features], hidden: Collection[IntegrationKind] = ()) -> PrefixCache:
        """Reads the prompts' beginning with each of these clips, for any number of questions.

        Args:
            hidden: integrations whose audio tokens the model may not see.
        """
        ids = torch.tensor([self.chat.prefix] * len(clips), device=self.model.device)
        return self.model.read_prefix(ids, None, *self._audio(clips), hidden=hidden)

    @torch.inference_mode()
    def prefill_stream(self, live: StreamingAudio, hidden: Collection[IntegrationKind] = ()) -> PrefixCache:
        """The same with what is kept of audio that still arrives; for questions until more of it is taken."""
        return self.model.prefix_of(
            torch.tensor([self.chat.prefix], device=self.model.device), None, live, hidden=hidden
        )

    @torch.inference_mode()
    def answer(
        self,
        prefix: PrefixCache,
        questions: Sequence[str],
        rows: Sequence[int],
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """Greedy answers of one batch, each at most `max_new_tokens` long.

        Args:
            prefix: of `hear`.
            rows: which of its clips each question is about.
            streamer: is given each token as it comes; for one question.

        Raises:
            UserError: a question that is too long, or holds the placeholder.
        """
        rests = [self.chat.prompt(question)[len(self.chat.prefix) :] for question in questions]
        longest = max(map(len, rests))
        device, pad = self.model.device, self.chat.pad_token_id
        generated = self.model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(rest)) + rest for rest in rests], device=device),
            attention_mask=torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rests], device=device),
            prefix=prefix,
            prefix_rows=torch.tensor(rows, device=device),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=self.chat.end_token_id,
            pad_token_id=pad,
            streamer=streamer,
        )
        return [self.chat.decode(ids) for ids in generated.tolist()]

    def answer_aloud(self, prefix: PrefixCache, question: str, write: Callable[[str], None]) -> Answer:
        """The answer to one question about the first clip of `prefix`; `write` is given the text as it comes.

        Raises:
            UserError: as `answer`.
        """
        words = Words(self.chat, write)
        start = time.perf_counter()
        (answer,) = self.answer(prefix, [question], [0], streamer=words)
        first, last, tokens = words.times_s[0], words.times_s[-1], len(words.times_s)
        return Answer(question, answer, tokens, first - start, (tokens - 1) / (last - first) if tokens > 1 else None)

    def attention_mass(self, features: Features, question: str, answer: str) -> AttentionMass:
        """Where in the clip and its text the tokens look that predict this answer.

        Raises:
            UserError: a conversation that is too long, or a model of flamingo streams.
        """
        row = self.chat.row([Question(question_id=question, question=question, answer=answer)])
        ids, labels = (torch.from_numpy(x)[None].to(self.model.device) for x in (row.input_ids, row.labels))
        return probe_attention(self.model, ids, labels, *self._audio([features]))

    def moments(self, look: AttentionMass) -> dict[str, NDArray[np.float32]]:
        """Pathway -> attention to each of its audio tokens, in order of time, summed over layers.

        Streams whose tokens stand for no particular moment (`qformer`) are left out.
        """
        curves: dict[str, NDArray[np.float32]] = {}
        for spec, weights_LN in zip(self.model.specs, look.tokens, strict=True):
            if spec.connector.kind != "qformer":
                name = f"{spec.integration} ({', '.join(spec.encoders)})"
                curves[name] = weights_LN.sum(0).numpy()
        return curves

    def _audio(self, clips: Sequence[Features]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and lengths as the model reads them."""
        names = self.feature_fingerprints
        lengths = {name: torch.tensor([len(clip[name]) for clip in clips]) for name in names}
        frames = {name: torch.from_numpy(np.concatenate([clip[name] for clip in clips])) for name in names}
        return {name: x.to(self.model.device, self.model.dtype) for name, x in frames.items()}, lengths


class Words(BaseStreamer):
    """Gives the text of one answer away as it comes.

    Args:
        write: is called with what was added.

    Attributes:
        times_s: when each token came, of `time.perf_counter`.
    """

    def __init__(self, chat: ChatTemplate, write: Callable[[str], None]) -> None:
        self._chat, self._write = chat, write
        self._ids: list[int] = []
        self._written = ""
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        if not value.numel():  # transformers begins with the prompt's ids, of which there are none
            return
        self.times_s.append(time.perf_counter())
        self._ids += value.flatten().tolist()
        text = self._chat.decode(self._ids)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            self._write(text.removeprefix(self._written))
            self._written = text

    def end(self) -> None:
        self._write(self._chat.decode(self._ids).removeprefix(self._written))
