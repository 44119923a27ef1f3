"""The line of positions that the streams of one clip share (method: Positions)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.core.streams import Stream
from pipeline.model.positions import AudioPlaces, place_beside


def streams_at_layer(streams: Sequence[Stream], integration: str, layer: int) -> tuple[int, ...]:
    """Indices of the streams of this integration that enter at this layer, in the order listed."""
    return tuple(i for i, s in enumerate(streams) if s.integration == integration and layer in s.audio_layers)


@lru_cache(maxsize=4096)
def clip_line(streams: tuple[Stream, ...], counts: tuple[int, ...], frames: tuple[int, ...]) -> tuple[Tensor, ...]:
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


def clip_places(
    streams: tuple[Stream, ...], token_counts: Sequence[Tensor], frame_counts: Sequence[Tensor]
) -> dict[tuple[int, ...], AudioPlaces]:
    """Places of audio tokens among those of their own clip: a row for each clip, slots as positions."""
    num_clips = len(token_counts[0])
    flat: list[list[Tensor]] = [[] for _ in streams]
    begin = [0 for _ in streams]
    for clip in range(num_clips):
        line = clip_line(streams, tuple(int(n[clip]) for n in token_counts), tuple(int(n[clip]) for n in frame_counts))
        for i, slot in enumerate(line):
            source = begin[i] + torch.arange(len(slot))
            begin[i] += len(slot)
            flat[i].append(torch.stack([torch.full_like(slot, clip), slot, torch.zeros_like(slot), source], dim=1))
    flats = [torch.cat(parts) for parts in flat]
    return {key: place_beside(key, flats, begin, num_clips) for key in beside_sets(streams)}


def beside_sets(streams: Sequence[Stream]) -> set[tuple[int, ...]]:
    """Sets of streams whose keys enter a layer together: LAL's in one attention, each flamingo stream in its own."""
    together = {streams_at_layer(streams, "lal", layer) for s in streams for layer in s.audio_layers} - {()}
    return together | {(i,) for i, s in enumerate(streams) if s.integration == "flamingo"}
