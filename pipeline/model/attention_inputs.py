"""What one forward pass passes to every layer, as one keyword argument: token metadata, masks and audio KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.model.audio_kv import PositionedKV
from pipeline.model.mask import MaskRule, additive_mask, block_mask, bool_mask
from pipeline.model.packing import PackedQuestions
from pipeline.model.positions import TokenMetadata

AttentionPath = Literal["auto", "sdpa", "flex"]
FLEX_FROM_KEYS = 2048  # with fewer keys a dense mask is small and SDPA's kernels start sooner


class LayerKind(NamedTuple):
    """Layers of one kind share a mask.

    Attributes:
        lal_streams: indices of the LAL streams that the layer attends to.
        window: sliding window in positions; None for none.
    """

    lal_streams: tuple[int, ...]
    window: int | None


@dataclass(eq=False)
class AttentionInputs:
    """Metadata of queries and keys in one forward pass, the audio KV beside them, and masks shared by all layers.

    Attributes:
        query, key: metadata of the sequence entries that query and that are keys (the cached ones included).
        audio: audio KV beside the sequence.
        plain_causal: query and key are the same entries and their memory order alone gives the mask.
        max_position: no position is larger.
        system_text_sees_audio: see `MaskRule`.
        attention_path: `sdpa`, `flex`, or `auto`: FlexAttention on a GPU where rows are packed or long.
        packed_questions: where packed questions are, to attend as rows of their own; None to keep rows as they are.
        hook: receives each layer's number and its attention weights, (B, H, Q, K) over `key_metadata(lal_streams)`.
        audio_metadata: metadata of the audio KV, (B, S), by the set of streams; empty means that of `audio`.
    """

    query: TokenMetadata
    key: TokenMetadata
    audio: PositionedKV
    plain_causal: bool
    max_position: int
    system_text_sees_audio: bool
    attention_path: AttentionPath = "auto"
    packed_questions: PackedQuestions | None = None
    hook: Callable[[int, Tensor], None] | None = None
    audio_metadata: dict[tuple[int, ...], TokenMetadata] = field(default_factory=dict)
    _masks: dict[tuple[LayerKind, bool], Tensor | BlockMask] = field(default_factory=dict, init=False)
    _flamingo_masks: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        rows = len(self.key.valid)
        self.audio_metadata = self.audio_metadata or {
            streams: layout.metadata.expand(rows) for streams, layout in self.audio.layouts.items()
        }

    @cached_property
    def prefix_inputs(self) -> AttentionInputs:
        """Inputs of the prefixes of packed rows alone; see `PackedQuestions`."""
        assert self.packed_questions is not None
        prefix = self.packed_questions.prefix_metadata(self.key)
        return self._sdpa_inputs(prefix, prefix, self.audio_metadata, plain_causal=not self.system_text_sees_audio)

    @cached_property
    def question_inputs(self) -> AttentionInputs:
        """Inputs of packed questions as rows of their own."""
        packed = self.packed_questions
        assert packed is not None
        prefix = packed.prefix_metadata(self.key).select_rows(packed.row)
        question = packed.question_metadata(self.key)
        audio = {streams: metadata.select_rows(packed.row) for streams, metadata in self.audio_metadata.items()}
        return self._sdpa_inputs(question, TokenMetadata.concat([prefix, question]), audio, plain_causal=False)

    def _sdpa_inputs(
        self,
        query: TokenMetadata,
        key: TokenMetadata,
        audio_metadata: dict[tuple[int, ...], TokenMetadata],
        *,
        plain_causal: bool,
    ) -> AttentionInputs:
        return replace(
            self,
            query=query,
            key=key,
            audio_metadata=audio_metadata,
            plain_causal=plain_causal,
            attention_path="sdpa",
            packed_questions=None,
            hook=None,
        )

    def effective_window(self, window: int | None) -> int | None:
        """Returns None for a window that reaches from the last position to the first."""
        return None if window is None or window > self.max_position else window

    def key_metadata(self, lal_streams: tuple[int, ...]) -> TokenMetadata:
        """Returns the metadata of all keys of a layer in memory order: audio of its LAL streams, then the sequence."""
        if not lal_streams:
            return self.key
        return TokenMetadata.concat([self.audio_metadata[lal_streams], self.key])

    def mask(self, kind: LayerKind, like: Tensor, *, flex: bool) -> Tensor | BlockMask | None:
        """Returns the mask of a layer, built once for each kind of layer; see `attention_ops.attend`.

        Args:
            like: the queries, for device and dtype.
            flex: FlexAttention may be used (it supports no dropout).
        """
        if not kind.lal_streams and self.plain_causal and kind.window is None:
            return None
        flex = flex and self.prefers_flex(kind, like)
        if (kind, flex) not in self._masks:
            rule, key = MaskRule(kind.window, self.system_text_sees_audio), self.key_metadata(kind.lal_streams)
            mask = block_mask(rule, self.query, key) if flex else additive_mask(rule, self.query, key, like.dtype)
            self._masks[kind, flex] = mask
        return self._masks[kind, flex]

    def prefers_flex(self, kind: LayerKind, like: Tensor) -> bool:
        """Returns whether these queries take FlexAttention, at a layer of this kind."""
        if self.attention_path != "auto" or like.shape[2] == 1:
            return self.attention_path == "flex" and like.shape[2] > 1
        audio_keys = self.audio_metadata[kind.lal_streams].valid.shape[1] if kind.lal_streams else 0
        long = self.key.valid.shape[1] + audio_keys > FLEX_FROM_KEYS
        return like.is_cuda and (long or not self.plain_causal)

    def flamingo_mask(self, stream: int) -> Tensor:
        """Returns (B, Q, S) bool: which tokens of a flamingo stream each query attends to."""
        if stream not in self._flamingo_masks:
            rule = MaskRule(None, self.system_text_sees_audio)
            self._flamingo_masks[stream] = bool_mask(rule, self.query, self.audio_metadata[(stream,)])
        return self._flamingo_masks[stream]
