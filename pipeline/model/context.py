"""What one forward pass gives to every attention layer: audio keys and values, places, masks. Travels by keyword."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.model.audio_streams import AudioStream
from pipeline.model.families import family_of, project_keys_values, rope, rope_kind, rotate
from pipeline.model.layout import AudioPlaces, Places, streams_at_layer
from pipeline.model.visibility import additive_mask, visible


class AudioKeys:
    """Keys and values that LAL gives, layer by layer, computed when a layer asks for them.

    Computing them inside the layer lets gradient checkpointing cover the per-layer projections.

    Args:
        streams: the model's streams, and `tokens` their audio tokens, (N, width) flat.
        beside: places of the keys, by the set of streams (see `Layout.beside`).
        dummy: the tokens stand in for a batch without audio: no query sees them.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        streams: Sequence[AudioStream],
        tokens: Sequence[Tensor],
        beside: dict[tuple[int, ...], AudioPlaces],
        *,
        norm_audio_tokens: bool,
        dummy: bool,
    ) -> None:
        self.language_model = language_model
        self.streams = streams
        self.tokens = tokens
        self.beside = beside
        self.norm_audio_tokens = norm_audio_tokens
        self.dummy = dummy
        self.family = family_of(language_model.config)
        self._active = {
            layer: streams_at_layer([s.spec for s in streams], "lal", layer)
            for layer in range(language_model.config.num_hidden_layers)
        }
        self._flat: dict[int, tuple[Tensor, Tensor]] = {}
        self._placed: dict[int, tuple[Tensor, Tensor]] = {}
        self._rope: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def active(self, layer: int) -> tuple[int, ...]:
        """Streams that give keys at this layer."""
        return self._active[layer]

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (not rotated) and values of the flat tokens, (N, kv_heads, head_dim)."""
        if layer in self._flat:
            return self._flat[layer]
        projected = [self.streams[i].layer_projections[str(layer)](self.tokens[i]) for i in self._active[layer]]
        x_ND = projected[0] if len(projected) == 1 else torch.cat(projected)
        decoder_layer = self.language_model.model.layers[layer]
        if torch.is_grad_enabled() and x_ND.requires_grad:
            # Keeps the projected tokens alone, not what the norm makes of them.
            return checkpoint(self._keys_values, decoder_layer, x_ND, use_reentrant=False, preserve_rng_state=False)
        return self._keys_values(decoder_layer, x_ND)

    def _keys_values(self, decoder_layer: nn.Module, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_audio_tokens and self.family.input_norm is not None:
            x_ND = decoder_layer.get_submodule(self.family.input_norm)(x_ND)
        return project_keys_values(decoder_layer.self_attn, self.family, x_ND)

    def place(self, layer: int, flat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values in rows, (B, kv_heads, S, head_dim)."""
        key = self._active[layer]
        audio = self.beside[key]
        k_NHD, v_NHD = flat
        if audio.regular:
            k_BSHD, v_BSHD = (x.unflatten(0, audio.source.shape) for x in flat)
        else:
            k_BSHD, v_BSHD = k_NHD[audio.source], v_NHD[audio.source]
        kind = (rope_kind(self.language_model.config, layer), key)
        if kind not in self._rope:
            self._rope[kind] = rope(self.language_model, layer, k_BSHD, audio.places.position)
        return rotate(k_BSHD, *self._rope[kind]).transpose(1, 2), v_BSHD.transpose(1, 2)

    def placed(self, layer: int) -> tuple[Tensor, Tensor]:
        """`place` of `flat`, or what `materialise` kept of it."""
        return self._placed[layer] if layer in self._placed else self.place(layer, self.flat(layer))

    def repeat(self, times: int) -> AudioKeys:
        """The same keys for each row `times` times (beams)."""
        if times == 1:
            return self
        repeated = AudioKeys(
            self.language_model,
            self.streams,
            self.tokens,
            {key: audio.repeat(times) for key, audio in self.beside.items()},
            norm_audio_tokens=self.norm_audio_tokens,
            dummy=self.dummy,
        )
        repeated._flat = self._flat
        repeated._placed = {
            layer: tuple(x if len(x) == 1 else x.repeat_interleave(times, dim=0) for x in pair)
            for layer, pair in self._placed.items()
        }
        return repeated

    def materialise(self) -> None:
        """Computes all layers once and keeps them: decoding asks for them at every step."""
        for layer, active in self._active.items():
            if active:
                self._flat[layer] = self.flat(layer)
                if not self.dummy:
                    self._placed[layer] = self.placed(layer)


class AttentionContext:
    """Places of queries and keys in one forward pass, the audio beside them, and masks made once for all layers.

    Args:
        query, key: places of the sequence entries that query and that are keys (the cached ones included).
        plain_causal: query and key are the same entries and their memory order alone gives the mask.
        max_position: no position is larger.
    """

    def __init__(
        self,
        query: Places,
        key: Places,
        audio: AudioKeys,
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

    def effective_window(self, window: int | None) -> int | None:
        """None for a window that reaches from the last position to the first."""
        return None if window is None or window > self.max_position else window

    def keys(self, active: tuple[int, ...]) -> Places:
        """Places of all keys of a layer in memory order: audio of the active streams, then the sequence."""
        if not active:
            return self.key
        audio = self.audio.beside[active].places
        return Places.concat([audio.expand(len(self.key.valid)), self.key])

    def seen(self, active: tuple[int, ...], window: int | None) -> Tensor:
        """(B, Nq, Nk) bool by the one rule."""
        return visible(self.query, self.keys(active), window, self.system_text_sees_audio)

    def mask(self, active: tuple[int, ...], window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, Nq, Nk) additive, made once for each kind of layer."""
        if (active, window) not in self._masks:
            self._masks[active, window] = additive_mask(self.seen(active, window), self.query.valid, dtype)
        return self._masks[active, window]
