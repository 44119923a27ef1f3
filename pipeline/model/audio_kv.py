"""Keys and values of the audio beside the sequence: of clips (no position in a row yet), and placed into rows."""

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
from pipeline.model.layers import recompute
from pipeline.model.mask import MaskRule, additive_mask
from pipeline.model.positions import AudioTokenLayout, clip_token_layouts, streams_at_layer, to_device


class AudioKV:
    """What a batch of clips gives to each layer. It depends on no text, so any number of prompts can share it.

    LAL's keys and values are computed when a layer asks for them: gradient checkpointing of the layer then covers
    the per-layer projections.

    Args:
        audio: tokens of the clips.
        norm_audio_tokens, audio_queries: see `PalConfig`.
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
        self._last_lal = max((layer for layer, active in self.lal.items() if active), default=None)
        self.flamingo = {layer: streams_at_layer(specs, "flamingo", layer) for layer in layers}
        self._lal: dict[int, KeysValues] = {}
        self._flamingo: dict[tuple[int, int], KeysValues] = {}
        if audio_queries:
            self._let_audio_query()

    def lal_keys_values(self, layer: int) -> KeysValues:
        """(N, kv_heads, head_dim) keys, not rotated, and values of this layer's LAL streams, one after the other."""
        if layer in self._lal:
            return self._lal[layer]
        parts = [part for i in self.lal[layer] for part in self._lal_parts(layer, i)]
        return parts[0] if len(parts) == 1 else (torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts]))

    def _lal_parts(self, layer: int, stream: int) -> list[KeysValues]:
        """Keys and values of one stream, of one half of its tokens after the other where gradients are wanted.

        What follows the projection is computed again in the backward pass. A norm's backward pass takes five times the
        size of its input, hence the halves, which also fit the cache better. Always two: ZeRO-3 wants every rank to
        call every module equally often. In the last layer half of the projection is computed again as well: the
        backward pass comes there first, while all else is still held, so the peak falls by as much as if every layer
        did so.
        """
        projection: Any = self.streams[stream].layer_projections[str(layer)]
        tokens = self.audio.tokens[stream]
        last = layer == self._last_lal

        def keys_values(x: Tensor) -> KeysValues:
            return self._keys_values(layer, projection.finish(x) if last else x)

        x = projection.input(tokens) if last else projection(tokens)
        return [recompute(keys_values, half) for half in (x.tensor_split(2) if torch.is_grad_enabled() else [x])]

    def flamingo_keys_values(self, layer: int, stream: int) -> KeysValues:
        """(N, heads, head_dim) keys and values of one flamingo stream at this layer."""
        if (layer, stream) in self._flamingo:
            return self._flamingo[layer, stream]
        block: Any = self.streams[stream].layer_blocks[str(layer)]
        return block.attention.keys_values(self.audio.tokens[stream])

    def remember(self) -> AudioKV:
        """Computes all layers now and keeps them, for decoding. Returns itself."""
        self._lal = {layer: self.lal_keys_values(layer) for layer, active in self.lal.items() if active}
        self.remember_flamingo()
        return self

    def remember_flamingo(self) -> None:
        """Computes what flamingo streams give to their layers now and keeps it."""
        for layer, streams in self.flamingo.items():
            for stream in streams:
                self._flamingo[layer, stream] = self.flamingo_keys_values(layer, stream)

    def release(self) -> None:
        """Forgets LAL's keys and values, once they are placed into rows for good."""
        self._lal.clear()

    @property
    def nbytes(self) -> int:
        """Memory of what is kept for decoding."""
        kept = [*self._lal.values(), *self._flamingo.values()]
        return sum(x.nbytes for pair in kept for x in pair)

    def _project(self, layer: int) -> Tensor:
        """P_l of the tokens of all LAL streams of this layer, (N, d)."""
        parts = [self.streams[i].layer_projections[str(layer)](self.audio.tokens[i]) for i in self.lal[layer]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _normed(self, decoder_layer: nn.Module, x_ND: Tensor) -> Tensor:
        if self.norm_audio_tokens and self.family.input_norm is not None:
            return decoder_layer.get_submodule(self.family.input_norm)(x_ND)
        return x_ND

    def _keys_values(self, layer: int, x_ND: Tensor) -> KeysValues:
        decoder_layer = self.language_model.model.layers[layer]
        return project_keys_values(decoder_layer.self_attn, self.family, self._normed(decoder_layer, x_ND))

    def _let_audio_query(self) -> None:
        """The `audio_queries` ablation: D_l = W_O Attention(n(A_l)), and later layers use A_l plus the earlier D.

        No text takes part, so all layers are computed before the first one of the text.
        """
        places = clip_token_layouts(tuple(s.spec for s in self.streams), self.audio.counts, self.audio.frames)
        carried: list[Tensor | None] = [None for _ in self.streams]
        for layer, active in self.lal.items():
            if not active:
                continue
            sizes = [len(self.audio.tokens[i]) for i in active]
            before = [carried[i] for i in active]
            carry = torch.cat([c if c is not None else self.audio.tokens[0].new_zeros(()).expand(n, self._hidden)
                               for c, n in zip(before, sizes, strict=True)])  # fmt: skip
            step = (layer, places[active], carry)
            if self.language_model.is_gradient_checkpointing and torch.is_grad_enabled():
                k, v, carry = checkpoint(self._query_layer, *step, use_reentrant=False)
            else:
                k, v, carry = self._query_layer(*step)
            self._lal[layer] = (k, v)
            for i, part in zip(active, carry.split(sizes), strict=True):
                carried[i] = part

    @property
    def _hidden(self) -> int:
        return self.language_model.config.hidden_size

    def _query_layer(self, layer: int, audio: AudioTokenLayout, carry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and `carry` plus what this layer's audio queries found; all flat."""
        config = self.language_model.config
        decoder_layer = self.language_model.model.layers[layer]
        attention = decoder_layer.self_attn
        x_ND = self._normed(decoder_layer, self._project(layer) + carry)
        k_NHE, v_NHE = project_keys_values(attention, self.family, x_ND)
        q_NHE = project_heads(attention, self.family, "q", x_ND)
        source, places = audio.source, audio.places.to(x_ND.device)
        here = to_device(source, x_ND.device)
        rows = [x[here] for x in (q_NHE, k_NHE, v_NHE)]
        cos, sin = rope(self.language_model, layer, x_ND, places.position)
        q, k, v = (x.transpose(1, 2) for x in (rotate(rows[0], cos, sin), rotate(rows[1], cos, sin), rows[2]))
        mask = additive_mask(MaskRule(sliding_window(config, layer)), places, places, q.dtype)
        out = attend(q, [(k, v)], mask, scaling=attention.scaling, softcap=score_softcap(config))
        valid = to_device(audio.places.valid.flatten().nonzero()[:, 0], x_ND.device)
        flat = out.transpose(1, 2).flatten(2).flatten(0, 1)[valid]
        # Rows hold the clips' tokens stream by stream; back to the order of the flat tokens.
        found = attention.o_proj(torch.zeros_like(flat).index_copy(0, here.flatten()[valid], flat))
        return k_NHE, v_NHE, carry + found


class PositionedKV:
    """Audio keys in the rows of one batch of text: gathered, and rotated to their positions.

    Args:
        beside: places of the keys, by the set of streams (see `Layout.beside`).
    """

    def __init__(self, clips: AudioKV, beside: dict[tuple[int, ...], AudioTokenLayout]) -> None:
        self.clips = clips
        self.beside = beside
        self.dummy_clip = clips.audio.dummy_clip
        self._lal: dict[int, KeysValues] = {}
        self._rope: dict[tuple[str, tuple[int, ...]], KeysValues] = {}

    def lal(self, layer: int) -> KeysValues:
        """(B, kv_heads, S, head_dim) keys and values of LAL at this layer."""
        if layer in self._lal:
            return self._lal[layer]
        active, model = self.clips.lal[layer], self.clips.language_model
        k_BSHE, v_BSHE = self.beside[active].rows(self.clips.lal_keys_values(layer))
        kind = (rope_kind(model.config, layer), active)
        if kind not in self._rope:
            self._rope[kind] = rope(model, layer, k_BSHE, self.beside[active].places.position)
        return rotate(k_BSHE, *self._rope[kind]).transpose(1, 2), v_BSHE.transpose(1, 2)

    def flamingo(self, layer: int, stream: int) -> KeysValues:
        """(B, S, heads, head_dim) keys and values of one flamingo stream at this layer."""
        return self.beside[(stream,)].rows(self.clips.flamingo_keys_values(layer, stream))

    def remember(self) -> PositionedKV:
        """Computes all layers now and keeps them, for decoding. Returns itself.

        One layer after the other: the clips keep no second, not rotated copy of LAL's keys.
        """
        if self.dummy_clip:
            self.clips.remember()
            return self
        self.clips.remember_flamingo()
        self._lal = {layer: self.lal(layer) for layer, active in self.clips.lal.items() if active}
        return self

    @property
    def nbytes(self) -> int:
        """Memory of what is kept for decoding."""
        return self.clips.nbytes + sum(x.nbytes for pair in self._lal.values() for x in pair)

    def pick(self, rows: Tensor) -> PositionedKV:
        """The keys of these rows, in this order; what all rows share stays shared."""
        picked = PositionedKV(self.clips, {key: audio.pick(rows) for key, audio in self.beside.items()})
        for layer, (k, v) in self._lal.items():
            picked._lal[layer] = (k, v) if len(k) == 1 else (k[rows], v[rows])
        return picked
