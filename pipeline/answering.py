"""An exported model that answers questions about clips. Owns loading and greedy generation; scores nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import checkpoint
from pipeline.config import ExperimentConfig, load_config
from pipeline.data.chat import IGNORE, Chat, Row, load_tokenizer
from pipeline.data.collate import Example, collate
from pipeline.data.shards import Clip
from pipeline.errors import UserError
from pipeline.model import PalForCausalLM

Features = Mapping[str, NDArray[np.float16]]


def load_answerer(folder: Path, max_new_tokens: int) -> Answerer:
    """The model of an exported folder, on a GPU where there is one, with the prompt that it was trained with.

    Raises:
        UserError: the folder is not an exported model.
    """
    if not (folder / checkpoint.CONFIG).is_file():
        fault = "is not an exported model" if folder.is_dir() else "does not exist"
        raise UserError(folder, fault, "give the folder `model` of a run, or one made by `pal export`")
    config = load_config(ExperimentConfig, folder / checkpoint.CONFIG)
    model = PalForCausalLM.from_pretrained(folder, dtype="auto")
    chat = Chat(load_tokenizer(folder), config.data.system_prompt, max_text_tokens=config.data.max_text_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Answerer(model.to(device), chat, max_new_tokens, config)


@dataclass(frozen=True)
class Request:
    """A question about a clip; `features` may be another clip's, as a control."""

    question: str
    clip: Clip
    features: Features


class Answerer:
    """A model, its prompt and its device.

    Args:
        config: what the model was trained by; None for a model of unknown training.

    Attributes:
        feature_fingerprints: encoder -> fingerprint of the features that the model understands.
    """

    def __init__(
        self, model: PalForCausalLM, chat: Chat, max_new_tokens: int, config: ExperimentConfig | None = None
    ) -> None:
        self.config = config
        self._model = model.eval()
        self._chat = chat
        self._max_new_tokens = max_new_tokens
        self.feature_fingerprints: dict[str, str] = model.config.feature_fingerprints

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Greedy answers of one batch, each at most `max_new_tokens` long."""
        examples = [Example(_prompt_row(self._chat.prompt(r.question)), [], r.clip, r.features) for r in requests]
        batch = collate(
            examples,
            pad_token_id=self._chat.pad_token_id,
            widths=self._model.config.encoder_widths,
            feature_dtype=self._model.dtype,
        )
        device = self._model.device
        generated = self._model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            audio_features={name: values.to(device) for name, values in batch["audio_features"].items()},
            audio_lengths={name: lengths.to(device) for name, lengths in batch["audio_lengths"].items()},
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=self._chat.end_token_id,
            pad_token_id=self._chat.pad_token_id,
        )
        return [self._chat.decode(ids) for ids in generated.tolist()]


def _prompt_row(prompt: Sequence[int]) -> Row:
    ids = np.array(prompt, np.int64)
    return Row(ids, np.full_like(ids, IGNORE), np.zeros_like(ids))
