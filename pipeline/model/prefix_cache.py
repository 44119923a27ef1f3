"""The beginning of conversations, up to the end of their audio: what is kept of it, and how a long one is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from pipeline.model.attention_inputs import AttentionInputs
from pipeline.model.positions import TokenMetadata

# Entries of a long prefix that are read at a time where masks are dense: memory stays linear in the audio.
PIECE = 512


@dataclass(frozen=True)
class PrefixCache:
    """Conversations up to the end of their audio, read once for any number of questions; a row for each.

    Attributes:
        attention_inputs: of the prefixes' own pass, with the audio keys and values of all layers.
        next_position: (rows,) position of the first token after each prefix.
        cache: keys and values of its text (and PLITS) tokens.
    """

    attention_inputs: AttentionInputs
    next_position: Tensor
    cache: Any

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept, linear in the length of the audio.

        With h = kv_heads * head_dim * bytes of a number: 2 h for each audio token of a LAL stream and each of its
        audio layers; 2 h for each text and PLITS token and every layer; and flamingo's, whose heads are all of width d.
        While LAL's audio is read its features and tokens come on top, and what one layer makes of them on the way: up
        to 8 numbers of the language model's width for each token.
        """
        return self.attention_inputs.audio.nbytes + sum(x.nbytes for n in self.cache.layers for x in (n.keys, n.values))

    def fill(self, cache: Cache, rows: Tensor) -> None:
        """Puts these rows, in this order, into an empty cache."""
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], number)


def pieces(attention_inputs: AttentionInputs, x_BTD: Tensor) -> Iterator[tuple[AttentionInputs, slice]]:
    """A pass over a prefix, as one or as several, each of which sees what the cache has of those before it.

    FlexAttention, on a GPU, makes no dense mask; and system text that sees the audio after it cannot be read before it.
    """
    total = x_BTD.shape[1]
    if total <= PIECE or x_BTD.is_cuda or attention_inputs.system_text_sees_audio:
        yield attention_inputs, slice(0, total)
        return
    for first in range(0, total, PIECE):
        last = min(first + PIECE, total)
        query = _cut(attention_inputs.key, first, last)
        key = _cut(attention_inputs.key, 0, last)
        part = AttentionInputs(
            query,
            key,
            attention_inputs.audio,
            plain_causal=False,
            max_position=attention_inputs.max_position,
            system_text_sees_audio=False,
            attention_path="sdpa",
        )
        yield part, slice(first, last)


def _cut(places: TokenMetadata, first: int, last: int) -> TokenMetadata:
    return places.map(lambda x: x[:, first:last])
