"""Audio KV: keys and values of the audio beside the sequence, of clips (no position yet) and positioned in rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.model.attention_ops import KeysValues, attend
from pipeline.model.audio_streams import AudioStream, AudioTokens
from pipeline.model.families import (
    family_of,
    project_heads,
    project_keys_values,
    rope,
    rope_kind,
    rotate,
    score_softcap,
    sliding_window,
)
from pipeline.model.layers import has_dropout, recompute
from pipeline.model.mask import MaskRule, additive_mask
from pipeline.model.positions import AudioTokenLayout, clip_token_layouts, streams_at_layer, to_device


class AudioKV:
    """Audio KV of a batch of clips for each layer. It depends on no text, so any number of prompts can share it.

    LAL's keys and values are computed when a layer requests them: gradient checkpointing of the layer then covers
    the per-layer projections.

    Args:
        audio: tokens of the clips.
        norm_audio_tokens, audio_queries: see `PalConfig`.

    Attributes:
        lal, flamingo: for each layer the indices of the streams of this integration that enter there.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        streams: Sequence[AudioStream],
        audio: AudioTokens,
        *,
        norm_audio_tokens: bool,
        audio_queries: bool,
    ) -> None:
        self.language_model = language_model
        self.streams = list(streams)
        self.audio = audio
        self.norm_audio_tokens = norm_audio_tokens
        self.family = family_of(language_model.config)
        specs = [s.spec for s in streams]
        layers = range(language_model.config.num_hidden_layers)
        self.lal = {layer: streams_at_layer(specs, "lal", layer) for layer in layers}
        self._last_lal = max((layer for layer, indices in self.lal.items() if indices), default=None)
        self.flamingo = {layer: streams_at_layer(specs, "flamingo", layer) for layer in layers}
        self._lal: dict[int, KeysValues] = {}
        self._flamingo: dict[tuple[int, int], KeysValues] = {}
        if audio_queries:
            self._run_audio_queries()

    def lal_keys_values(self, layer: int) -> KeysValues:
        """Returns (N, kv_heads, E) keys, not rotated, and values of this layer's LAL streams, one after the other."""
        if layer in self._lal:
            return self._lal[layer]
        parts = [part for i in self.lal[layer] for part in self._lal_parts(layer, i)]
        return parts[0] if len(parts) == 1 else (torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]))

    def _lal_parts(self, layer: int, stream: int) -> list[KeysValues]:
        """Returns keys and values of one stream, in two halves of its tokens where gradients are computed.

        What follows the projection is recomputed in the backward pass. A norm's backward pass takes five times the
        size of its input, hence the halves, which also fit the cache better. Always two: ZeRO-3 needs every rank to
        call every module equally often. In the last LAL layer half of the projection is recomputed as well: the
        backward pass reaches it first, while everything else is still in memory, so the peak falls by as much as if
        every layer did so.
        """
        projection: Any = self.streams[stream].layer_projections[str(layer)]
        tokens_NW = self.audio.tokens[stream]
        last = layer == self._last_lal

        def keys_values(x: Tensor) -> KeysValues:
            return self._keys_values(layer, stream, projection.finish(x) if last else x)

        x = projection.input(tokens_NW) if last else projection(tokens_NW)
        draws = has_dropout(self.language_model.model.layers[layer].self_attn)  # of adapters
        halves = x.tensor_split(2) if torch.is_grad_enabled() else [x]
        return [recompute(keys_values, half, draws=draws) for half in halves]

    def flamingo_keys_values(self, layer: int, stream: int) -> KeysValues:
        """Returns (N, H, E) keys and values of one flamingo stream at this layer."""
        if (layer, stream) in self._flamingo:
            return self._flamingo[layer, stream]
        block: Any = self.streams[stream].layer_blocks[str(layer)]
        return block.attention.keys_values(self.audio.tokens[stream])

    def precompute(self) -> AudioKV:
        """Computes all layers now and keeps them, for decoding. Returns itself."""
        self._lal = {layer: self.lal_keys_values(layer) for layer, indices in self.lal.items() if indices}
        self.precompute_flamingo()
        return self

    def precompute_flamingo(self) -> None:
        """Computes the keys and values of flamingo streams at all layers now and keeps them."""
        for layer, streams in self.flamingo.items():
            for stream in streams:
                self._flamingo[layer, stream] = self.flamingo_keys_values(layer, stream)

    def release(self) -> None:
        """Frees LAL's keys and values, once rows hold positioned copies of them."""
        self._lal.clear()

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values that are kept for decoding, in bytes."""
        pairs = [*self._lal.values(), *self._flamingo.values()]
        return sum(x.nbytes for pair in pairs for x in pair)

    def _project(self, layer: int) -> Tensor:
        """Returns P_l of the tokens of all LAL streams of this layer, (N, D)."""
        parts = [self.streams[i].layer_projections[str(layer)](self.audio.tokens[i]) for i in self.lal[layer]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _input_norm(self, decoder_layer: nn.Module, x_ND: Tensor) -> Tensor:
        if self.norm_audio_tokens and self.family.input_norm is not None:
            return decoder_layer.get_submodule(self.family.input_norm)(x_ND)
        return x_ND

    def _keys_values(self, layer: int, stream: int, x_ND: Tensor) -> KeysValues:
        decoder_layer = self.language_model.model.layers[layer]
        x_ND = self._input_norm(decoder_layer, x_ND)
        return self._scale(layer, stream, project_keys_values(decoder_layer.self_attn, self.family, x_ND))

    def _scale(self, layer: int, stream: int, keys_values: KeysValues) -> KeysValues:
        """Applies the stream's gain, after the norm of the keys, which would undo it."""
        gains = self.streams[stream].layer_gains
        return gains[str(layer)](*keys_values) if len(gains) else keys_values

    def _scale_streams(self, layer: int, keys_values: KeysValues) -> KeysValues:
        """Applies each stream's gain to its part of the keys and values of a layer."""
        sizes = [len(self.audio.tokens[i]) for i in self.lal[layer]]
        pairs = zip(*(x.split(sizes) for x in keys_values), strict=True)
        scaled = [self._scale(layer, i, pair) for i, pair in zip(self.lal[layer], pairs, strict=True)]
        return torch.cat([k for k, _ in scaled]), torch.cat([v for _, v in scaled])

    def _run_audio_queries(self) -> None:
        """Runs the `audio_queries` ablation: D_l = W_O Attention(n(A_l)), and later layers use A_l plus the earlier D.

        It reads no text, so all layers are computed before the first layer of the text.
        """
        layouts = clip_token_layouts(tuple(s.spec for s in self.streams), self.audio.counts, self.audio.frames)
        carried: list[Tensor | None] = [None for _ in self.streams]
        hidden_size = self.language_model.config.hidden_size
        for layer, indices in self.lal.items():
            if not indices:
                continue
            sizes = [len(self.audio.tokens[i]) for i in indices]
            previous = [carried[i] for i in indices]
            carry_ND = torch.cat([c if c is not None else self.audio.tokens[0].new_zeros(()).expand(n, hidden_size)
                                  for c, n in zip(previous, sizes, strict=True)])  # fmt: skip
            arguments = (layer, layouts[indices], carry_ND)
            if self.language_model.is_gradient_checkpointing and torch.is_grad_enabled():
                k_NHE, v_NHE, carry_ND = checkpoint(self._query_layer, *arguments, use_reentrant=False)
            else:
                k_NHE, v_NHE, carry_ND = self._query_layer(*arguments)
            self._lal[layer] = (k_NHE, v_NHE)
            for i, part in zip(indices, carry_ND.split(sizes), strict=True):
                carried[i] = part

    def _query_layer(self, layer: int, audio: AudioTokenLayout, carry_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys, values, and `carry_ND` plus the attention output of this layer's audio queries; all flat."""
        config = self.language_model.config
        decoder_layer = self.language_model.model.layers[layer]
        attention = decoder_layer.self_attn
        x_ND = self._input_norm(decoder_layer, self._project(layer) + carry_ND)
        k_NHE, v_NHE = self._scale_streams(layer, project_keys_values(attention, self.family, x_ND))
        q_NHE = project_heads(attention, self.family, "q", x_ND)
        metadata, source = audio.metadata.to(x_ND.device), to_device(audio.source, x_ND.device)
        q_CSHE, k_CSHE, v_CSHE = (x[source] for x in (q_NHE, k_NHE, v_NHE))
        cos_CSE, sin_CSE = rope(self.language_model, layer, x_ND, metadata.position)
        heads = (rotate(q_CSHE, cos_CSE, sin_CSE), rotate(k_CSHE, cos_CSE, sin_CSE), v_CSHE)
        q_CHSE, k_CHSE, v_CHSE = (x.transpose(1, 2) for x in heads)
        mask = additive_mask(MaskRule(sliding_window(config, layer)), metadata, metadata, q_CHSE.dtype)
        softcap = score_softcap(config)
        out_CHSE = attend(q_CHSE, [(k_CHSE, v_CHSE)], mask, scaling=attention.scaling, softcap=softcap)
        valid = to_device(audio.metadata.valid.flatten().nonzero()[:, 0], x_ND.device)
        out_NI = out_CHSE.transpose(1, 2).flatten(2).flatten(0, 1)[valid]
        # Rows hold the clips' tokens stream by stream; back to the order of the flat tokens.
        flat_NI = torch.zeros_like(out_NI).index_copy(0, source.flatten()[valid], out_NI)
        return k_NHE, v_NHE, carry_ND + attention.o_proj(flat_NI)


class PositionedKV:
    """Audio KV in the rows of one batch of text: gathered, and rotated to their positions.

    Args:
        layouts: layouts of the audio tokens, by the set of streams (see `Layout.audio_layouts`).
    """

    def __init__(self, clips: AudioKV, layouts: dict[tuple[int, ...], AudioTokenLayout]) -> None:
        self.clips = clips
        self.layouts = layouts
        self.dummy_clip = clips.audio.dummy_clip
        self._lal: dict[int, KeysValues] = {}
        self._rope: dict[tuple[str, tuple[int, ...]], KeysValues] = {}

    def lal(self, layer: int) -> KeysValues:
        """Returns (B, kv_heads, S, E) keys and values of LAL at this layer."""
        if layer in self._lal:
            return self._lal[layer]
        indices, model = self.clips.lal[layer], self.clips.language_model
        k_BSHE, v_BSHE = self.layouts[indices].gather(self.clips.lal_keys_values(layer))
        kind = (rope_kind(model.config, layer), indices)
        if kind not in self._rope:
            self._rope[kind] = rope(model, layer, k_BSHE, self.layouts[indices].metadata.position)
        return rotate(k_BSHE, *self._rope[kind]).transpose(1, 2), v_BSHE.transpose(1, 2)

    def flamingo(self, layer: int, stream: int) -> KeysValues:
        """Returns (B, S, H, E) keys and values of one flamingo stream at this layer."""
        return self.layouts[(stream,)].gather(self.clips.flamingo_keys_values(layer, stream))

    def precompute(self) -> PositionedKV:
        """Computes all layers now and keeps them, for decoding. Returns itself.

        One layer after the other, so that no second, unrotated copy of LAL's keys is kept in the clips.
        """
        if self.dummy_clip:
            self.clips.precompute()
            return self
        self.clips.precompute_flamingo()
        self._lal = {layer: self.lal(layer) for layer, indices in self.clips.lal.items() if indices}
        return self

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values that are kept for decoding, in bytes."""
        return self.clips.nbytes + sum(x.nbytes for pair in self._lal.values() for x in pair)

    def select_rows(self, rows: Tensor) -> PositionedKV:
        """Returns the keys and values of these rows, in this order; what all rows share stays shared."""
        selected = PositionedKV(self.clips, {key: audio.select_rows(rows) for key, audio in self.layouts.items()})
        for layer, (k, v) in self._lal.items():
            selected._lal[layer] = (k, v) if len(k) == 1 else (k[rows], v[rows])
        return selected
