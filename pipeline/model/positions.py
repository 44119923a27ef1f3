"""TokenMetadata of queries and keys: position, segment and kind, in rows. What the visibility rule reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.core.streams import Stream


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. What comes from the host is pinned first: a copy from other memory waits for the device."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


@dataclass(frozen=True)
class TokenMetadata:
    """What the visibility rule reads of queries or keys; every tensor is (B, N).

    Attributes:
        position: int64; -1 where not valid.
        segment: int64; 0 = shared prefix of the row.
        valid: bool; False for padding.
        audio: bool; True for audio tokens.
    """

    position: Tensor
    segment: Tensor
    valid: Tensor
    audio: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenMetadata:
        """The function on every tensor."""
        return TokenMetadata(*(function(getattr(self, f.name)) for f in fields(self)))

    def to(self, device: torch.device) -> TokenMetadata:
        return self.map(lambda x: to_device(x, device))

    def expand(self, rows: int) -> TokenMetadata:
        """The same places for each of `rows` rows, where there is but one."""
        return self.map(lambda x: x.expand(rows, -1))

    def pick(self, rows: Tensor) -> TokenMetadata:
        """These rows, in this order."""
        return self.map(lambda x: x[rows])

    @staticmethod
    def concat(parts: Sequence[TokenMetadata]) -> TokenMetadata:
        """Keys of several origins in one memory order."""
        return TokenMetadata(*(torch.cat([getattr(p, f.name) for p in parts], dim=1) for f in fields(TokenMetadata)))


@dataclass(frozen=True)
class AudioTokenLayout:
    """The keys beside the sequence that one set of streams gives.

    Attributes:
        places: (B, S), padded on the right.
        source: (B, S) index into the flat tokens of these streams, one stream after the other.
        regular: `source` only cuts the flat tokens into rows of equal length, so a view does.
    """

    places: TokenMetadata
    source: Tensor
    regular: bool

    def rows(self, flat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Flat keys and values, (N, heads, head_dim) each, sorted into rows: (B, S, heads, head_dim)."""
        first, second = flat
        if self.regular:
            return first.unflatten(0, self.source.shape), second.unflatten(0, self.source.shape)
        return first[self.source], second[self.source]

    def shared(self) -> AudioTokenLayout:
        """One row in place of all, if all rows are the same (many questions about one clip)."""
        tables = (self.source, self.places.position, self.places.segment, self.places.valid)
        if not all(bool((t == t[:1]).all()) for t in tables):
            return self
        return AudioTokenLayout(self.places.map(lambda x: x[:1]), self.source[:1], False)

    def pick(self, rows: Tensor) -> AudioTokenLayout:
        """These rows, in this order; places that all rows share stay one row."""
        if len(self.source) == 1:
            return self
        return AudioTokenLayout(self.places.pick(rows), self.source[rows], False)

    def hide(self) -> AudioTokenLayout:
        """The same keys, seen by no query."""
        places = replace(self.places, valid=torch.zeros_like(self.places.valid))
        return replace(self, places=places)

    def to(self, device: torch.device) -> AudioTokenLayout:
        return AudioTokenLayout(self.places.to(device), to_device(self.source, device), self.regular)


def arrange_in_rows(
    key: tuple[int, ...], flats: Sequence[Tensor], counts: Sequence[int], batch: int
) -> AudioTokenLayout:
    """Sorts the flat tokens of these streams into rows, padded on the right."""
    base = 0
    parts = []
    for i in key:
        part = flats[i].clone()
        part[:, 3] += base
        base += counts[i]
        parts.append(part)
    flat = torch.cat(parts)
    flat = flat[flat[:, 0].argsort(stable=True)]
    row = flat[:, 0]
    per_row = torch.bincount(row, minlength=batch)
    width = max(int(per_row.max()), 1)
    column = torch.arange(len(row)) - (per_row.cumsum(0) - per_row)[row]
    tables = torch.zeros(3, batch, width, dtype=torch.long)
    tables[:, row, column] = flat[:, 1:].T
    valid = torch.zeros(batch, width, dtype=torch.bool)
    valid[row, column] = True
    position = torch.where(valid, tables[0], 0)
    regular = bool(valid.all()) and len(row) == base and torch.equal(flat[:, 3], torch.arange(base))
    return AudioTokenLayout(TokenMetadata(position, tables[1], valid, torch.ones_like(valid)), tables[2], regular)


def streams_at_layer(streams: Sequence[Stream], integration: str, layer: int) -> tuple[int, ...]:
    """Indices of the streams of this integration that enter at this layer, in the order listed."""
    return tuple(i for i, s in enumerate(streams) if s.integration == integration and layer in s.audio_layers)


@lru_cache(maxsize=4096)
def clip_positions(streams: tuple[Stream, ...], counts: tuple[int, ...], frames: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Slots of one clip's tokens on its line of positions.

    Streams take slots one after the other, in the order listed; summary streams are interleaved with the stream
    that they summarise, each token right after the tokens that cover its frames. Flamingo takes no slot.

    Args:
        counts: tokens of the clip in each stream.
        frames: frames of the clip that each stream reads.

    Returns:
        for each stream (count,) slots from 0; for flamingo all 0.
    """
    slots = [torch.zeros(count, dtype=torch.long) for count in counts]
    taken = 0
    for i, stream in enumerate(streams):
        if stream.integration == "flamingo" or _is_interleaved(streams, i):
            continue
        group = [i] + [j for j in range(len(streams)) if _is_interleaved(streams, j) and streams[j].summary_of == i]
        kinds = len(group)
        order = [torch.arange(counts[i]) * kinds + kinds - 1]
        for kind, j in enumerate(group[1:]):
            covered = (torch.arange(counts[j]) + 1) * streams[j].connector.summary_stride
            # tokens of the full stream that come before this summary, rounded up where they are coarser than frames
            before = -(-covered.clamp(max=frames[i]) * counts[i] // max(frames[i], 1))
            order.append(before * kinds + kind)
        rank = torch.cat(order).argsort(stable=True).argsort()
        for j, part in zip(group, rank.split([counts[j] for j in group]), strict=True):
            slots[j] = taken + part
        taken += len(rank)
    return tuple(slots)


def _is_interleaved(streams: Sequence[Stream], index: int) -> bool:
    stream = streams[index]
    if stream.summary_of is None or stream.integration == "flamingo":
        return False
    return streams[stream.summary_of].integration != "flamingo" and streams[stream.summary_of].summary_of is None


def clip_token_layouts(
    streams: tuple[Stream, ...], token_counts: Sequence[Tensor], frame_counts: Sequence[Tensor]
) -> dict[tuple[int, ...], AudioTokenLayout]:
    """TokenMetadata of audio tokens among those of their own clip: a row for each clip, slots as positions."""
    num_clips = len(token_counts[0])
    flat: list[list[Tensor]] = [[] for _ in streams]
    begin = [0 for _ in streams]
    for clip in range(num_clips):
        line = clip_positions(
            streams, tuple(int(n[clip]) for n in token_counts), tuple(int(n[clip]) for n in frame_counts)
        )
        for i, slot in enumerate(line):
            source = begin[i] + torch.arange(len(slot))
            begin[i] += len(slot)
            flat[i].append(torch.stack([torch.full_like(slot, clip), slot, torch.zeros_like(slot), source], dim=1))
    flats = [torch.cat(parts) for parts in flat]
    return {key: arrange_in_rows(key, flats, begin, num_clips) for key in stream_sets(streams)}


def stream_sets(streams: Sequence[Stream]) -> set[tuple[int, ...]]:
    """Sets of streams whose keys enter a layer together: LAL's in one attention, each flamingo stream in its own."""
    together = {streams_at_layer(streams, "lal", layer) for s in streams for layer in s.audio_layers} - {()}
    return together | {(i,) for i, s in enumerate(streams) if s.integration == "flamingo"}
