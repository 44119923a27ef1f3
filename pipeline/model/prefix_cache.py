"""The KV cache of prefixes (conversations up to the end of their audio), and prefill of a long prefix in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from pipeline.model.attention_inputs import AttentionInputs
from pipeline.model.positions import TokenMetadata

# Entries of a long prefix that one pass reads where masks are dense: memory stays linear in the audio.
CHUNK = 512


@dataclass(frozen=True)
class PrefixCache:
    """Conversations up to the end of their audio, prefilled once for any number of questions; a row for each.

    Attributes:
        attention_inputs: attention inputs of the prefill, with the audio KV of all layers.
        next_position: (B,) position of the first token after each prefix.
        cache: keys and values of the prefixes' text (and PLITS) tokens.
    """

    attention_inputs: AttentionInputs
    next_position: Tensor
    cache: Any

    @property
    def nbytes(self) -> int:
        """Memory of the cache and the audio KV in bytes, linear in the length of the audio.

        With h = kv_heads * head_dim * bytes of a number: 2 h for each audio token of a LAL stream and each of its
        audio layers; 2 h for each text and PLITS token and every layer; and flamingo's, whose heads together have the
        width of the language model. The prefill of LAL's audio needs more: its features, its tokens, and the
        intermediates of one layer, up to 8 numbers of the language model's width for each token.
        """
        return self.attention_inputs.audio.nbytes + sum(x.nbytes for n in self.cache.layers for x in (n.keys, n.values))

    def fill(self, cache: Cache, rows: Tensor) -> None:
        """Copies these rows, in this order, into an empty cache."""
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], number)


def prefill_chunks(attention_inputs: AttentionInputs, x_BTD: Tensor) -> Iterator[tuple[AttentionInputs, slice]]:
    """Splits the prefill of a prefix into passes, each of which attends to what the cache holds of the earlier ones.

    One pass on a GPU, where FlexAttention builds no dense mask, and where system text attends to later audio.

    Yields:
        attention inputs of a pass, and the entries that it reads.
    """
    total = x_BTD.shape[1]
    if total <= CHUNK or x_BTD.is_cuda or attention_inputs.system_text_sees_audio:
        yield attention_inputs, slice(0, total)
        return
    for first in range(0, total, CHUNK):
        last = min(first + CHUNK, total)
        inputs = AttentionInputs(
            _slice(attention_inputs.key, first, last),
            _slice(attention_inputs.key, 0, last),
            attention_inputs.audio,
            plain_causal=False,
            max_position=attention_inputs.max_position,
            system_text_sees_audio=False,
            attention_path="sdpa",
        )
        yield inputs, slice(first, last)


def _slice(metadata: TokenMetadata, first: int, last: int) -> TokenMetadata:
    return metadata.map(lambda x: x[:, first:last])
