"""What one forward pass gives to every layer: places, masks, audio keys. It travels as one keyword argument."""

from __future__ import annotations

from torch import Tensor

from pipeline.model.audio_keys import PlacedKeys
from pipeline.model.layout import Places
from pipeline.model.visibility import additive_mask, visible


class AttentionContext:
    """Places of queries and keys in one forward pass, the audio beside them, and masks made once for all layers.

    Args:
        query, key: places of the sequence entries that query and that are keys (the cached ones included).
        audio: keys beside the sequence.
        plain_causal: query and key are the same entries and their memory order alone gives the mask.
        max_position: no position is larger.
    """

    def __init__(
        self,
        query: Places,
        key: Places,
        audio: PlacedKeys,
        *,
        plain_causal: bool,
        max_position: int,
        system_text_sees_audio: bool,
    ) -> None:
        self.query = query
        self.key = key
        self.audio = audio
        self.plain_causal = plain_causal
        self.max_position = max_position
        self.system_text_sees_audio = system_text_sees_audio
        self._masks: dict[tuple[tuple[int, ...], int | None], Tensor] = {}
        self._flamingo: dict[int, Tensor] = {}

    def effective_window(self, window: int | None) -> int | None:
        """None for a window that reaches from the last position to the first."""
        return None if window is None or window > self.max_position else window

    def keys(self, active: tuple[int, ...]) -> Places:
        """Places of all keys of a layer in memory order: audio of the active streams, then the sequence."""
        if not active:
            return self.key
        return Places.concat([self.audio.beside[active].places.expand(len(self.key.valid)), self.key])

    def mask(self, active: tuple[int, ...], window: int | None, like: Tensor) -> Tensor | None:
        """(B, 1, Nq, Nk) additive, made once for each kind of layer; None where plain causal order says it all."""
        if not active and self.plain_causal and window is None:
            return None
        if (active, window) not in self._masks:
            seen = visible(self.query, self.keys(active), window, self.system_text_sees_audio)
            self._masks[active, window] = additive_mask(seen, self.query.valid, like.dtype)
        return self._masks[active, window]

    def flamingo_seen(self, stream: int) -> Tensor:
        """(B, Nq, S) bool: what of a flamingo stream each query sees."""
        if stream not in self._flamingo:
            places = self.audio.beside[(stream,)].places.expand(len(self.key.valid))
            self._flamingo[stream] = visible(self.query, places, None, self.system_text_sees_audio)
        return self._flamingo[stream]
