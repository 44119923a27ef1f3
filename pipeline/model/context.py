"""What one forward pass gives to every layer: places, masks, audio keys. It travels as one keyword argument."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.model.audio_keys import PlacedKeys
from pipeline.model.layout import Places
from pipeline.model.visibility import Rule, additive_mask, block_mask, visible

AttentionPath = Literal["auto", "sdpa", "flex"]
FLEX_FROM_KEYS = 2048  # below it a dense mask is small and SDPA's kernels start sooner


class AttentionContext:
    """Places of queries and keys in one forward pass, the audio beside them, and masks made once for all layers.

    Args:
        query, key: places of the sequence entries that query and that are keys (the cached ones included).
        audio: keys beside the sequence.
        plain_causal: query and key are the same entries and their memory order alone gives the mask.
        max_position: no position is larger.
        attention_path: `sdpa`, `flex`, or `auto`: FlexAttention on a GPU where rows are packed or long.
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
        attention_path: AttentionPath = "auto",
    ) -> None:
        self.query = query
        self.key = key
        self.audio = audio
        self.plain_causal = plain_causal
        self.max_position = max_position
        self.system_text_sees_audio = system_text_sees_audio
        self.attention_path = attention_path
        self._masks: dict[tuple[tuple[int, ...], int | None, bool], Tensor | BlockMask] = {}
        self._flamingo: dict[int, Tensor] = {}

    def effective_window(self, window: int | None) -> int | None:
        """None for a window that reaches from the last position to the first."""
        return None if window is None or window > self.max_position else window

    def keys(self, active: tuple[int, ...]) -> Places:
        """Places of all keys of a layer in memory order: audio of the active streams, then the sequence."""
        if not active:
            return self.key
        return Places.concat([self.audio.beside[active].places.expand(len(self.key.valid)), self.key])

    def mask(
        self, active: tuple[int, ...], window: int | None, like: Tensor, *, flex: bool
    ) -> Tensor | BlockMask | None:
        """The mask of a layer, made once for each kind of layer; see `kernels.attend`.

        Args:
            like: the queries, for device and dtype.
            flex: FlexAttention may be used (it knows no dropout).
        """
        if not active and self.plain_causal and window is None:
            return None
        flex = flex and self._prefers_flex(active, like)
        if (active, window, flex) not in self._masks:
            rule, key = Rule(window, self.system_text_sees_audio), self.keys(active)
            made = block_mask(rule, self.query, key) if flex else additive_mask(rule, self.query, key, like.dtype)
            self._masks[active, window, flex] = made
        return self._masks[active, window, flex]

    def _prefers_flex(self, active: tuple[int, ...], like: Tensor) -> bool:
        if self.attention_path != "auto" or like.shape[2] == 1:
            return self.attention_path == "flex" and like.shape[2] > 1
        beside = self.audio.beside[active].source.shape[1] if active else 0
        long = self.key.valid.shape[1] + beside > FLEX_FROM_KEYS
        return like.is_cuda and (long or not self.plain_causal)

    def flamingo_seen(self, stream: int) -> Tensor:
        """(B, Nq, S) bool: what of a flamingo stream each query sees."""
        if stream not in self._flamingo:
            places = self.audio.beside[(stream,)].places.expand(len(self.key.valid))
            self._flamingo[stream] = visible(Rule(None, self.system_text_sees_audio), self.query, places)
        return self._flamingo[stream]
