"""Streaming audio: keys and values of audio that arrives window by window, of which the newest are kept."""

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
    """Audio KV of the newest windows of a stream of audio, for `prefill_audio_kv`.

    LAL's keys and values depend on no text and on no other audio, and are kept unrotated. So the windows that remain
    when the oldest are dropped are a clip of their own: answers equal those about a clip of these windows alone.

    Memory: 2 * kv_heads * head_dim * bytes of a number, for each kept audio token and each audio layer of its stream
    (`nbytes`). A prefix cache built from it takes as much again.

    Args:
        max_tokens: encoder -> largest number of audio tokens to keep; the newest window is always kept.

    Raises:
        UserError: the model's audio tokens depend on earlier audio.
    """

    def __init__(self, model: PalForCausalLM, max_tokens: Mapping[str, int]) -> None:
        _require_independent_tokens(model)
        no_audio = AudioTokens([], [], [], dummy_clip=False)
        settings = {"norm_audio_tokens": model.config.norm_audio_tokens, "audio_queries": False}
        super().__init__(model.language_model, model.audio_streams, no_audio, **settings)
        self._max_tokens = max_tokens
        # For each stream its windows, oldest first; for each window layer -> keys and values.
        self._windows: list[deque[dict[int, KeysValues]]] = [deque() for _ in self.streams]

    @torch.no_grad()
    def push(self, encoder: str, features_NW: Tensor) -> None:
        """Appends the features of an encoder's next window, and drops the oldest windows beyond `max_tokens`."""
        length = torch.tensor([len(features_NW)])
        for index, (stream, windows) in enumerate(zip(self.streams, self._windows, strict=True)):
            if stream.spec.encoders == (encoder,):
                tokens_NW = stream.connector([features_NW], [length])
                projected = {int(layer): project(tokens_NW) for layer, project in stream.layer_projections.items()}
                windows.append({layer: self._keys_values(layer, index, x_ND) for layer, x_ND in projected.items()})
                while len(windows) > 1 and _count(windows) > self._max_tokens[encoder]:
                    windows.popleft()
        counts = [torch.tensor([_count(windows)]) for windows in self._windows]
        self.audio = AudioTokens([], counts, counts, dummy_clip=False)

    def _lal_parts(self, layer: int, stream: int) -> list[KeysValues]:
        return [window[layer] for window in self._windows[stream]]

    @property
    def nbytes(self) -> int:
        """Memory of the kept keys and values, in bytes."""
        pairs = [pair for windows in self._windows for window in windows for pair in window.values()]
        return sum(x.nbytes for pair in pairs for x in pair)


def _count(windows: deque[dict[int, KeysValues]]) -> int:
    return sum(len(next(iter(window.values()))[0]) for window in windows)


def _require_independent_tokens(model: PalForCausalLM) -> None:
    reasons = [
        f"integrates audio by {spec.integration}"
        if spec.integration != "lal"
        else f"has the connector {spec.connector.kind}, which reads clips as a whole"
        for spec in model.specs
        if spec.integration != "lal" or spec.connector.kind not in ("linear", "mlp")
    ]
    if model.config.audio_queries:
        reasons.append("lets audio attend to earlier audio (audio_queries)")
    if reasons:
        remedy = "use a model of LAL streams with a linear or mlp connector, or pass a finished file"
        raise UserError("streaming audio", f"this model {reasons[0]}", remedy)
