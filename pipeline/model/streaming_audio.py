"""Audio that still arrives: its keys and values, window by window, of which the newest are kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.model.attention_ops import KeysValues
from pipeline.model.audio_kv import AudioKV
from pipeline.model.audio_streams import AudioTokens

if TYPE_CHECKING:
    from pipeline.model.modeling import PalForCausalLM


class StreamingAudio(AudioKV):
    """The newest audio of one clip without an end, as `prefix_of` reads it.

    LAL's keys and values depend on no text and on no other audio, and are kept not rotated. So what is left when the
    oldest windows are dropped is a clip of its own: answers are those about a clip of these windows alone.

    Memory: 2 * kv_heads * head_dim * bytes of a number, for each kept audio token and each audio layer of its stream
    (`nbytes`). A prefix made of it takes as much again, while it lives.

    Args:
        most_tokens: encoder -> audio tokens that are kept at most; never fewer than the newest window has.

    Raises:
        UserError: a model whose audio tokens depend on the audio before them.
    """

    def __init__(self, model: PalForCausalLM, most_tokens: Mapping[str, int]) -> None:
        _require_independent_tokens(model)
        nothing = AudioTokens([], [], [], dummy_clip=False)
        settings = {"norm_audio_tokens": model.config.norm_audio_tokens, "audio_queries": False}
        super().__init__(model.language_model, model.audio_streams, nothing, **settings)
        self._most_tokens = most_tokens
        # For each stream its windows, oldest first: layer -> keys and values.
        self._windows: list[deque[dict[int, KeysValues]]] = [deque() for _ in self.streams]

    @torch.no_grad()
    def push(self, encoder: str, features_FW: Tensor) -> None:
        """Takes the features of the next window of one encoder, and drops the oldest windows beyond the bound."""
        length = torch.tensor([len(features_FW)])
        for stream, windows in zip(self.streams, self._windows, strict=True):
            if stream.spec.encoders == (encoder,):
                tokens = stream.connector([features_FW], [length])
                projected = {int(layer): project(tokens) for layer, project in stream.layer_projections.items()}
                windows.append({layer: self._keys_values(layer, x_ND) for layer, x_ND in projected.items()})
                while len(windows) > 1 and _count(windows) > self._most_tokens[encoder]:
                    windows.popleft()
        counts = [torch.tensor([_count(windows)]) for windows in self._windows]
        self.audio = AudioTokens([], counts, counts, dummy_clip=False)

    def _lal_parts(self, layer: int, stream: int) -> list[KeysValues]:
        return [window[layer] for window in self._windows[stream]]

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        kept = [pair for windows in self._windows for window in windows for pair in window.values()]
        return sum(x.nbytes for pair in kept for x in pair)


def _count(windows: deque[dict[int, KeysValues]]) -> int:
    return sum(len(next(iter(window.values()))[0]) for window in windows)


def _require_independent_tokens(model: PalForCausalLM) -> None:
    reasons = [
        f"puts audio into {spec.integration}"
        if spec.integration != "lal"
        else f"has the connector {spec.connector.kind}, which reads clips as a whole"
        for spec in model.specs
        if spec.integration != "lal" or spec.connector.kind not in ("linear", "mlp")
    ]
    if model.config.audio_queries:
        reasons.append("lets audio query earlier audio")
    if reasons:
        remedy = "use a model of LAL streams with a linear or mlp connector, or give a finished file"
        raise UserError("audio that still arrives", f"this model {reasons[0]}", remedy)
