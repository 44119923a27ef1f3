"""Token metadata (position, segment, kind), which the mask rule reads, and positions of audio tokens within a clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.core.streams import Stream


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device. Host memory is pinned first: a copy from pageable memory waits for the device."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


@dataclass(frozen=True)
class TokenMetadata:
    """What the mask rule reads of queries or keys; every tensor has the same shape, (B, T), (B, S) or (J, U).

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
        """Applies the function to every tensor."""
        return TokenMetadata(*(function(getattr(self, f.name)) for f in fields(self)))

    def to(self, device: torch.device) -> TokenMetadata:
        return self.map(lambda x: to_device(x, device))

    def expand(self, rows: int) -> TokenMetadata:
        """Repeats a single row `rows` times, without a copy; leaves `rows` rows as they are."""
        return self.map(lambda x: x.expand(rows, -1))

    def select_rows(self, rows: Tensor) -> TokenMetadata:
        """Returns these rows, in this order."""
        return self.map(lambda x: x[rows])

    @staticmethod
    def concat(parts: Sequence[TokenMetadata]) -> TokenMetadata:
        """Joins the metadata of keys from several sources, in their memory order."""
        return TokenMetadata(*(torch.cat([getattr(p, f.name) for p in parts], dim=1) for f in fields(TokenMetadata)))


@dataclass(frozen=True)
class AudioTokenLayout:
    """The audio tokens that one set of streams puts beside the sequence, arranged in rows.

    Attributes:
        metadata: (B, S), padded on the right.
        source: (B, S) index into the flat tokens of these streams, one stream after the other. Those of padding are
            spread over the tokens: the backward pass of a gather on a GPU adds equal indices one after the other.
        is_view: `source` only splits the flat tokens into rows of equal length, so a view replaces the gather.
    """

    metadata: TokenMetadata
    source: Tensor
    is_view: bool

    def gather(self, flat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Arranges flat keys and values, (N, H, E) each, in rows: (B, S, H, E)."""
        key_NHE, value_NHE = flat
        if self.is_view:
            return key_NHE.unflatten(0, self.source.shape), value_NHE.unflatten(0, self.source.shape)
        return key_NHE[self.source], value_NHE[self.source]

    def merge_equal_rows(self) -> AudioTokenLayout:
        """Returns one row in place of all where all rows are equal (many questions about one clip)."""
        tables = (self.source, self.metadata.position, self.metadata.segment, self.metadata.valid)
        if not all(bool((t == t[:1]).all()) for t in tables):
            return self
        return AudioTokenLayout(self.metadata.map(lambda x: x[:1]), self.source[:1], False)

    def select_rows(self, rows: Tensor) -> AudioTokenLayout:
        """Returns these rows, in this order; a single row that all share stays a single row."""
        if len(self.source) == 1:
            return self
        return AudioTokenLayout(self.metadata.select_rows(rows), self.source[rows], False)

    def hide(self) -> AudioTokenLayout:
        """Returns the same tokens, masked from every query."""
        metadata = replace(self.metadata, valid=torch.zeros_like(self.metadata.valid))
        return replace(self, metadata=metadata)

    def to(self, device: torch.device) -> AudioTokenLayout:
        return AudioTokenLayout(self.metadata.to(device), to_device(self.source, device), self.is_view)


def arrange_in_rows(
    streams: tuple[int, ...], tables: Sequence[Tensor], counts: Sequence[int], batch: int
) -> AudioTokenLayout:
    """Arranges the flat tokens of a set of streams in rows, padded on the right.

    Args:
        streams: indices of the streams.
        tables: for each stream of the model (tokens, 4): row, position, segment and source of each token.
        counts: for each stream of the model the number of its flat tokens.
        batch: number of rows.
    """
    offset = 0
    parts = []
    for i in streams:
        part = tables[i].clone()
        part[:, 3] += offset
        offset += counts[i]
        parts.append(part)
    table = torch.cat(parts)
    table = table[table[:, 0].argsort(stable=True)]
    row = table[:, 0]
    per_row = torch.bincount(row, minlength=batch)
    width = max(int(per_row.max()), 1)
    column = torch.arange(len(row)) - (per_row.cumsum(0) - per_row)[row]
    padded = torch.zeros(3, batch, width, dtype=torch.long)
    padded[2] = torch.arange(width) % max(offset, 1)
    padded[:, row, column] = table[:, 1:].T
    valid = torch.zeros(batch, width, dtype=torch.bool)
    valid[row, column] = True
    position = torch.where(valid, padded[0], 0)
    is_view = bool(valid.all()) and len(row) == offset and torch.equal(table[:, 3], torch.arange(offset))
    return AudioTokenLayout(TokenMetadata(position, padded[1], valid, torch.ones_like(valid)), padded[2], is_view)


def streams_at_layer(streams: Sequence[Stream], integration: str, layer: int) -> tuple[int, ...]:
    """Returns the indices of the streams of this integration that enter at this layer, in the order listed."""
    return tuple(i for i, s in enumerate(streams) if s.integration == integration and layer in s.audio_layers)


@lru_cache(maxsize=4096)
def clip_positions(streams: tuple[Stream, ...], counts: tuple[int, ...], frames: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Returns the positions of one clip's audio tokens, counted from the start of the clip.

    Streams take positions one after the other, in the order listed; a summary stream is interleaved with the stream
    that it summarises, each summary token right after the tokens that cover its frames. Flamingo takes no positions.

    Args:
        counts: tokens of the clip in each stream.
        frames: frames of the clip that each stream reads.

    Returns:
        for each stream (count,) positions from 0; for flamingo all 0.
    """
    positions = [torch.zeros(count, dtype=torch.long) for count in counts]
    taken = 0
    for i, stream in enumerate(streams):
        if stream.integration == "flamingo" or _is_interleaved(streams, i):
            continue
        group = [i] + [j for j in range(len(streams)) if _is_interleaved(streams, j) and streams[j].summary_of == i]
        size = len(group)
        sort_keys = [torch.arange(counts[i]) * size + size - 1]
        for number, j in enumerate(group[1:]):
            covered = (torch.arange(counts[j]) + 1) * streams[j].connector.summary_stride
            # tokens of the full stream that precede this summary, rounded up where they are coarser than frames
            preceding = -(-covered.clamp(max=frames[i]) * counts[i] // max(frames[i], 1))
            sort_keys.append(preceding * size + number)
        rank = torch.cat(sort_keys).argsort(stable=True).argsort()
        for j, part in zip(group, rank.split([counts[j] for j in group]), strict=True):
            positions[j] = taken + part
        taken += len(rank)
    return tuple(positions)


def _is_interleaved(streams: Sequence[Stream], index: int) -> bool:
    stream = streams[index]
    if stream.summary_of is None or stream.integration == "flamingo":
        return False
    return streams[stream.summary_of].integration != "flamingo" and streams[stream.summary_of].summary_of is None


def clip_token_layouts(
    streams: tuple[Stream, ...], token_counts: Sequence[Tensor], frame_counts: Sequence[Tensor]
) -> dict[tuple[int, ...], AudioTokenLayout]:
    """Lays out each clip alone, as a row whose positions start at 0: what audio queries attend within.

    Args:
        token_counts, frame_counts: for each stream (C,) audio tokens of each clip, and the frames they were made of.

    Returns:
        the layout of each of `stream_sets`, with a row for each clip.
    """
    num_clips = len(token_counts[0])
    tables: list[list[Tensor]] = [[] for _ in streams]
    begin = [0 for _ in streams]
    for clip in range(num_clips):
        positions = clip_positions(
            streams, tuple(int(n[clip]) for n in token_counts), tuple(int(n[clip]) for n in frame_counts)
        )
        for i, position in enumerate(positions):
            source = begin[i] + torch.arange(len(position))
            begin[i] += len(position)
            columns = [torch.full_like(position, clip), position, torch.zeros_like(position), source]
            tables[i].append(torch.stack(columns, dim=1))
    joined = [torch.cat(parts) for parts in tables]
    return {key: arrange_in_rows(key, joined, begin, num_clips) for key in stream_sets(streams)}


def stream_sets(streams: Sequence[Stream]) -> set[tuple[int, ...]]:
    """Returns the sets of streams that a layer attends to together: all of LAL's, and each flamingo stream alone."""
    lal_sets = {streams_at_layer(streams, "lal", layer) for s in streams for layer in s.audio_layers} - {()}
    return lal_sets | {(i,) for i, s in enumerate(streams) if s.integration == "flamingo"}
