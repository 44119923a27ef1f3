"""Builds small random models of every family and integration, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.core.streams import Connector, Gain, Preset, preset_streams, with_gain
from pipeline.model import PalConfig, PalForCausalLM

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Olmo2")
PRESETS: tuple[Preset, ...] = ("plits", "lal", "pal_v2", "pal_v3", "delayed", "flamingo")
AUDIO_TOKEN, VOCABULARY, LAYERS = 96, 97, 6
WIDTHS = {"one": 20, "two": 12}


def language_model_config(family: str = "Llama", **changes: Any) -> transformers.PretrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("Gemma2", "Gemma3Text", "Mistral"):
        sizes["sliding_window"] = 7
    return getattr(transformers, f"{family}Config")(**(sizes | changes))


def build(
    preset: Preset = "lal",
    family: str = "Llama",
    *,
    connector: Connector | None = None,
    gain: Gain | None = None,
    seed: int = 0,
    open_gates: bool = True,
    language_model: dict[str, Any] | None = None,
    **switches: Any,
) -> PalForCausalLM:
    """Builds a model in evaluation mode, with biases, norms and gates off their neutral values."""
    encoders = ["one", "two"] if preset == "pal_v2" else ["one"]
    streams = with_gain(preset_streams(preset, encoders, LAYERS, connector=connector or Connector()), gain)
    torch.manual_seed(seed)
    config = PalConfig(
        language_model_config(family, **(language_model or {})), streams, WIDTHS, AUDIO_TOKEN, **switches
    )
    model = PalForCausalLM(config)
    if open_gates:
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@dataclass
class Batch:
    """Rows of tokens with placeholders, labels on the last tokens, and clips."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    audio_features: dict[str, Tensor]
    audio_lengths: dict[str, Tensor]
    segment_ids: Tensor | None = None

    def arguments(self, *, labels: bool = True) -> dict[str, Any]:
        values = {k: v for k, v in self.__dict__.items() if v is not None}
        return values if labels else {k: v for k, v in values.items() if k != "labels"}

    def to(self, device: str) -> Batch:
        def move(value: Any) -> Any:
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value.to(device)

        return Batch(**{k: move(v) for k, v in self.__dict__.items() if v is not None})


def batch(rows: list[list[int]], frames: list[int], seed: int = 0, *, pad_to: int = 0, left: bool = False) -> Batch:
    """Pads rows of token ids, and draws clips with these numbers of frames, in the order of the placeholders."""
    total = max(pad_to, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), total, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, row in enumerate(rows):
        begin = total - len(row) if left else 0
        ids[b, begin : begin + len(row)] = torch.tensor(row)
        mask[b, begin : begin + len(row)] = 1
        labels[b, begin + len(row) - 2 : begin + len(row)] = torch.tensor(row[-2:])
    clips = {
        name: [
            torch.randn(n, width, generator=torch.Generator().manual_seed(seed + 100 * c)) for c, n in enumerate(frames)
        ]
        for name, width in WIDTHS.items()
    }
    features = {name: torch.cat(parts) if parts else torch.empty(0, WIDTHS[name]) for name, parts in clips.items()}
    lengths = {name: torch.tensor(frames, dtype=torch.long) for name in WIDTHS}
    return Batch(ids, mask, labels, features, lengths)


A = AUDIO_TOKEN
ROWS = [[5, 6, A, 7, 8, 9, 10], [11, A, 12, 13, A, 14, 15, 16, 17], [18, 19, 20, 21]]
FRAMES = [5, 7, 4]
