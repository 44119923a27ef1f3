"""Perplexity of a text file: whether a language model still predicts text after training on audio.

Needs no question set and reads any exported model, or any language model in the Hugging Face format."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.console import logger, progress
from pipeline.core.errors import UserError
from pipeline.data.chat_template import load_tokenizer
from pipeline.data.plain_text import PlainTextTokenizer
from pipeline.data.template_parts import AUDIO_TOKEN
from pipeline.evaluation.intervals import bootstrap_ratio_ci95
from pipeline.inference.responder import load_config_of
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.model.language_models import language_model_config
from pipeline.training import run_dir
from pipeline.training.exported_model import load_model

KIND = "text"  # as in `text=FILE` on the command line
_WINDOW = 1024  # tokens that are predicted in one pass; each sees those before it in its window


@dataclass(frozen=True)
class DocumentLosses:
    """The losses of a model on the documents of a file.

    Attributes:
        nats: (documents,) sum over the predicted tokens.
        tokens: (documents,) number of predicted tokens.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]

    def scores(self) -> dict[str, Any]:
        """Returns `nats_per_token` and `perplexity`, each with its 95 % interval over documents, and the counts."""
        mean, (low, high) = float(self.nats.sum() / self.tokens.sum()), self._interval(self.nats)
        return {
            "nats_per_token": mean,
            "nats_per_token_ci95": [low, high],
            "perplexity": math.exp(mean),
            "perplexity_ci95": [math.exp(low), math.exp(high)],
            "tokens": int(self.tokens.sum()),
            "documents": len(self.nats),
        }

    def difference(self, base: DocumentLosses) -> dict[str, Any]:
        """Returns how many nats per token more than `base` the model needs, with the interval over paired documents."""
        nats = self.nats - base.nats
        return {"nats_per_token": float(nats.sum() / self.tokens.sum()), "ci95": list(self._interval(nats))}

    def _interval(self, nats: NDArray[np.float64]) -> tuple[float, float]:
        return bootstrap_ratio_ci95(nats, self.tokens, [f"{number:09}" for number in range(len(nats))])


def evaluate_text(model: Path, file: Path, limit: int | None = None) -> dict[str, Any]:
    """Computes the perplexity of a text file under a model, and under the language model that it was trained from.

    Args:
        model: exported folder, or a language model in the Hugging Face format.
        limit: number of documents, evenly spaced; None means all.

    Returns:
        scores of `DocumentLosses`; for an exported model also `base` with those of its language model before the
        training and `increase`, the difference in nats per token. Plain JSON.

    Raises:
        UserError: the file has no text, or the model cannot be read.
    """
    documents = read_documents(file)
    if limit is not None and limit < len(documents):
        documents = [documents[number * len(documents) // limit] for number in range(limit)]
    if not (model / run_dir.CONFIG).is_file():
        return document_losses(_load_language_model(str(model), "auto"), str(model), documents, file).scores()
    config, _ = load_config_of(model)
    trained = load_model(model, config)
    dtype, losses = trained.dtype, document_losses(trained, str(model), documents, file)
    del trained  # two models may not fit
    scores, base = losses.scores(), config.model.language_model
    try:
        base_losses = document_losses(_load_language_model(base, dtype), base, documents, file)
    except UserError as error:
        logger.warning(f"no comparison with the language model before the training: {error}")
        return scores
    if base_losses.tokens.tolist() != losses.tokens.tolist():
        logger.warning(f"no comparison with {base}: it has another tokenizer now")
        return scores
    return {
        **scores,
        "base": {"language_model": base, **base_losses.scores()},
        "increase": losses.difference(base_losses),
    }


def read_documents(file: Path) -> list[str]:
    """Returns the documents of a file: `text` of each row of JSON lines; otherwise what blank lines separate, or the
    lines of a file without blank lines.

    Raises:
        UserError: it cannot be read, is not UTF-8, has a row without `text`, or no text at all.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(file, f"cannot be read ({error.strerror})", "give a text file, as text=FILE") from error
    except UnicodeDecodeError as error:
        raise UserError(file, f"is not UTF-8 ({error})", "convert it (iconv -t UTF-8)") from error
    if file.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                documents.append(_text_of(line, f"{file}:{number}"))
    else:
        blocks = [block.strip("\n") for block in text.split("\n\n")]
        documents = blocks if len([block for block in blocks if block.strip()]) > 1 else text.split("\n")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(file, "holds no text", "give a file with held-out text")
    return documents


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(where, f"has no field `text` ({error!r})", 'give rows like {"text": "..."}') from error
    if not isinstance(text, str):
        raise UserError(where, "has a field `text` that is no text", 'give rows like {"text": "..."}')
    return text


@torch.inference_mode()
def document_losses(model: PalForCausalLM, name: str, documents: list[str], file: Path) -> DocumentLosses:
    """Computes the loss of every token of each document, except for its first one where the tokenizer marks no start.

    A document longer than a window (1024 tokens, or the model's positions) is cut, so that the first tokens of a window
    see less of what precedes them.

    Args:
        name: folder or Hub name, whose tokenizer is read. A control token in the text is encoded as its characters.
        file: file of the documents, for errors.

    Raises:
        UserError: no document has two tokens, or the tokenizer cannot encode one.
    """
    tokenizer = load_tokenizer(name)
    plain_text, start = PlainTextTokenizer(tokenizer), tokenizer("")["input_ids"]
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    window = min(_WINDOW, model.config.language_model.max_position_embeddings)
    nats, tokens = [], []
    with progress(len(documents), "documents") as bar:
        for number, document in enumerate(documents, start=1):
            ids = start + plain_text.encode(("", document), f"{file}, document {number}")
            total = 0.0
            for first in range(0, len(ids) - 1, window - 1):
                row = torch.tensor([ids[first : first + window]])  # its first token is the last of the window before
                output = model(input_ids=row.to(model.device), labels=row.to(model.device), num_items_in_batch=1)
                total += float(output.token_losses.double().sum())
            if len(ids) > 1:
                nats.append(total)
                tokens.append(len(ids) - 1)
            bar.advance()
    if not tokens:
        raise UserError(file, "has no document with two tokens", "give longer texts")
    return DocumentLosses(np.array(nats), np.array(tokens, np.float64))


def _load_language_model(name: str, dtype: torch.dtype | Literal["auto"]) -> PalForCausalLM:
    """Loads a language model without streams.

    Raises:
        UserError: it cannot be read.
    """
    config = language_model_config(name)
    audio_token_id: int = load_tokenizer(name).convert_tokens_to_ids(AUDIO_TOKEN)
    pal_config = PalConfig(config, audio_token_id=audio_token_id, base_language_model=name)
    try:
        return PalForCausalLM.from_language_model(pal_config, dtype)
    except OSError as error:
        fault = f"has no usable weights ({str(error).splitlines()[0]})"
        raise UserError(name, fault, "name a Hugging Face folder or a model on the Hub") from error
