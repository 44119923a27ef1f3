"""What one forward pass gives to every layer: places, masks, audio keys. It travels as one keyword argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.model.audio_kv import PositionedKV
from pipeline.model.mask import MaskRule, additive_mask, block_mask, visible
from pipeline.model.packing import PackedQuestions
from pipeline.model.positions import TokenMetadata

AttentionPath = Literal["auto", "sdpa", "flex"]
FLEX_FROM_KEYS = 2048  # below it a dense mask is small and SDPA's kernels start sooner


class AttentionInputs:
    """TokenMetadata of queries and keys in one forward pass, the audio beside them, and masks made once for all layers.

    Args:
        query, key: places of the sequence entries that query and that are keys (the cached ones included).
        audio: keys beside the sequence, and `beside` their places; None means those of `audio`.
        plain_causal: query and key are the same entries and their memory order alone gives the mask.
        max_position: no position is larger.
        attention_path: `sdpa`, `flex`, or `auto`: FlexAttention on a GPU where rows are packed or long.
        packed_questions: how to attend to packed questions as rows of their own; None for rows as they are.
        hook: is given each layer's number and its attention weights, (B, heads, Nq, Nk) over `keys(active)`.
    """

    def __init__(
        self,
        query: TokenMetadata,
        key: TokenMetadata,
        audio: PositionedKV,
        *,
        beside: dict[tuple[int, ...], TokenMetadata] | None = None,
        plain_causal: bool,
        max_position: int,
        system_text_sees_audio: bool,
        attention_path: AttentionPath = "auto",
        packed_questions: PackedQuestions | None = None,
        hook: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.query = query
        self.key = key
        self.audio = audio
        rows = len(key.valid)
        self.beside = beside or {k: a.places.expand(rows) for k, a in audio.beside.items()}
        self.plain_causal = plain_causal
        self.max_position = max_position
        self.system_text_sees_audio = system_text_sees_audio
        self.attention_path = attention_path
        self.packed_questions = packed_questions
        self.hook = hook
        self._masks: dict[tuple[tuple[int, ...], int | None, bool], Tensor | BlockMask] = {}
        self._flamingo: dict[int, Tensor] = {}

    @cached_property
    def prefixes(self) -> AttentionInputs:
        """The context of the prefixes of packed rows alone; see `PackedQuestions`."""
        assert self.packed_questions is not None
        places = self.packed_questions.prefix_metadata(self.key)
        return self._part(places, places, self.beside, plain_causal=not self.system_text_sees_audio)

    @cached_property
    def questions(self) -> AttentionInputs:
        """The context of packed questions as rows of their own."""
        u = self.packed_questions
        assert u is not None
        prefix, own = u.prefix_metadata(self.key).map(lambda x: x[u.row]), u.question_metadata(self.key)
        beside = {key: places.map(lambda x: x[u.row]) for key, places in self.beside.items()}
        return self._part(own, TokenMetadata.concat([prefix, own]), beside, plain_causal=False)

    def _part(
        self,
        query: TokenMetadata,
        key: TokenMetadata,
        beside: dict[tuple[int, ...], TokenMetadata],
        *,
        plain_causal: bool,
    ) -> AttentionInputs:
        return AttentionInputs(
            query,
            key,
            self.audio,
            beside=beside,
            plain_causal=plain_causal,
            max_position=self.max_position,
            system_text_sees_audio=self.system_text_sees_audio,
            attention_path="sdpa",
        )

    def effective_window(self, window: int | None) -> int | None:
        """None for a window that reaches from the last position to the first."""
        return None if window is None or window > self.max_position else window

    def keys(self, active: tuple[int, ...]) -> TokenMetadata:
        """TokenMetadata of all keys of a layer in memory order: audio of the active streams, then the sequence."""
        if not active:
            return self.key
        return TokenMetadata.concat([self.beside[active], self.key])

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
        flex = flex and self.prefers_flex(active, like)
        if (active, window, flex) not in self._masks:
            rule, key = MaskRule(window, self.system_text_sees_audio), self.keys(active)
            made = block_mask(rule, self.query, key) if flex else additive_mask(rule, self.query, key, like.dtype)
            self._masks[active, window, flex] = made
        return self._masks[active, window, flex]

    def prefers_flex(self, active: tuple[int, ...], like: Tensor) -> bool:
        """Whether FlexAttention is the path of these queries, at a layer with these streams."""
        if self.attention_path != "auto" or like.shape[2] == 1:
            return self.attention_path == "flex" and like.shape[2] > 1
        beside = self.beside[active].valid.shape[1] if active else 0
        long = self.key.valid.shape[1] + beside > FLEX_FROM_KEYS
        return like.is_cuda and (long or not self.plain_causal)

    def flamingo_seen(self, stream: int) -> Tensor:
        """(B, Nq, S) bool: what of a flamingo stream each query sees."""
        if stream not in self._flamingo:
            rule = MaskRule(None, self.system_text_sees_audio)
            self._flamingo[stream] = visible(rule, self.query, self.beside[(stream,)])
        return self._flamingo[stream]
