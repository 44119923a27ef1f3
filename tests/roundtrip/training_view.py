"""What a model is trained on, read through `pal inspect`, and what it should be trained on by an independent rendering
of ChatML."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from pipeline import cli
from pipeline.data.feature_set import FeatureSet
from tests.helpers.feature_sets import byte_tokenizer
from tests.roundtrip.truth import RATE_HZ, Item, Sound

SYSTEM = "Listen."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
AUDIO = "◖audio◗"
MEL_BANDS = 64
Seen = tuple[Any, ...]


def write_language_model(folder: Path) -> Path:
    """Writes the config and the tokenizer (one token per byte) of a language model; data needs no weights."""
    byte_tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2).save_pretrained(folder)
    return folder


def inspect(folder: Path, features: Path, *options: str) -> list[dict[str, Any]]:
    """Returns the rows of `pal inspect CONFIG --json` for a training on a feature set."""
    model = folder / "language_model"
    if not model.exists():
        write_language_model(model)
    config = {
        "output": str(folder / "run"),
        "model": {"language_model": str(model), "integration": "plits"},
        "data": {"train": str(features), "system_prompt": SYSTEM, "max_text_tokens": 4096},
        "train": {"steps": 1, "precision": "fp32"},
    }
    file, rows = folder / "config.yaml", folder / "rows.json"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["inspect", str(file), "--json", str(rows), *options]) == 0
    return json.loads(rows.read_text())["rows"]


def seen_by_model(rows: Sequence[dict[str, Any]], features: Path, sounds: Sequence[Sound]) -> Counter[Seen]:
    """Returns what is trained on: (texts and sounds, texts with loss, dataset, domain, task) with their counts."""
    identify = _Identifier(features, sounds)
    seen: Counter[Seen] = Counter()
    for row in rows:
        numbers = [identify(clip_id) for clip_id in row["audio_ids"]]
        for number, duration_s in zip(numbers, row["duration_s"], strict=True):
            assert abs(sounds[number].duration_s - duration_s) < 1e-3, f"{row['clip_id']} is not as long as its sound"
        text = _canonical(characters(row["input_ids"]))
        trained = [token_id for token_id, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        labels = [label for label in row["labels"] if label != -100]
        assert labels == trained
        seen[text, tuple(numbers), characters(labels), row["dataset"], row["domain"], row["task"]] += 1
    return seen


def expected(items: Sequence[Item]) -> Counter[Seen]:
    """Returns what should be trained on, in the form of `seen_by_model`."""
    counts: Counter[Seen] = Counter()
    for item in items:
        text = _turn("system", SYSTEM if item.system is None else item.system)
        losses = ""
        for number, ((content, answer), loss) in enumerate(
            zip(item.turns, item.loss or [True] * len(item.turns), strict=True)
        ):
            user = content
            if number == len(item.turns) - 1 and item.choices:
                lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
                user = [*content[:-1], f"{str(content[-1]).strip()}\n{lines}"]
            text += _turn("user", "".join(AUDIO if isinstance(part, int) else part for part in user))
            text += _turn("assistant", answer)
            losses += f"{answer.strip()}◖im_end◗" if loss else ""
        counts[_canonical(text), tuple(item.sounds), losses, item.dataset, item.domain, item.task] += 1
    return counts


def difference(seen: Counter[Seen], wanted: Counter[Seen]) -> str:
    """Returns what is trained on without being meant, and what is missing, in lines that are easy to compare."""
    lines = [(repr(value), f"unexpected {count}") for value, count in (seen - wanted).items()]
    lines += [(repr(value), f"missing {count}") for value, count in (wanted - seen).items()]
    return "\n".join(f"{kind}: {value}" for value, kind in sorted(lines))


def _turn(role: str, text: str) -> str:
    return f"◖im_start◗{role}\n{text.strip()}◖im_end◗\n"


def _canonical(text: str) -> str:
    """Returns the text without white space around places of audio and at its end."""
    return re.sub(rf"\s*{AUDIO}\s*", AUDIO, text).strip()


def characters(ids: Sequence[int]) -> str:
    """Returns the text of token ids; control tokens, which a text cannot spell, as marks."""
    tokens = _tokenizer().convert_ids_to_tokens(ids)
    data = b"".join(
        f"◖{token.strip('<|>')}◗".encode() if len(token) > 1 else bytes([_bytes()[token]]) for token in tokens
    )
    return data.decode()


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<audio>"], special_tokens=True)
    return tokenizer


@functools.cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


class _Identifier:
    """Finds the sound that the stored features of a clip were computed from."""

    def __init__(self, features: Path, sounds: Sequence[Sound]) -> None:
        self._set, self._sounds = FeatureSet(features, ["log_mel"]), sounds
        self._indices = {self._set.clip(index).clip_id: index for index in range(len(self._set))}

    def __call__(self, clip_id: str) -> int:
        return loudest_sound(self._set.features(self._indices[clip_id], clip_id)["log_mel"], self._sounds)


def loudest_sound(frames: NDArray[np.float16], sounds: Sequence[Sound]) -> int:
    """Returns the number of the sound whose pitch is the loudest band of log-mel features."""
    loudest = int(frames.astype(np.float32).reshape(-1, MEL_BANDS).mean(0).argmax())
    return int(np.abs(np.array([_mel_band(sound.frequency_hz) for sound in sounds]) - loudest).argmin())


def _mel_band(frequency_hz: float) -> float:
    return 2595 * np.log10(1 + frequency_hz / 700) / (2595 * np.log10(1 + RATE_HZ / 2 / 700)) * (MEL_BANDS + 1) - 1
