"""Where every token of a batch goes: the sequence that the language model sees, positions, segments, targets.

Pure functions on CPU tensors; the only place that knows how audio takes positions (method: Positions, Mask).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.streams import IntegrationKind, Stream
from pipeline.model.packing import PackedQuestions, find_packed_questions
from pipeline.model.positions import (
    AudioTokenLayout,
    TokenMetadata,
    arrange_in_rows,
    clip_positions,
    stream_sets,
    to_device,
)

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Layout:
    """A batch as the language model sees it: B rows of T sequence entries.

    Attributes:
        token_ids: (B, T) text tokens; 0 where an entry is audio or padding.
        places: of the sequence entries.
        sequence_entries: for each stream the flat entries b * T + t that its tokens take (PLITS; else empty).
        sequence_sources: for each stream the flat tokens that go there.
        beside: stream indices -> the keys they give beside the sequence (LAL, flamingo).
        input_entries: (B, T_in) flat entry b * T + t of each input token; of a placeholder and of padding the entry
            before what follows, whose prediction is the next token.
        predictors, targets: (M,) flat entries b * T + t that carry loss and the token each must predict.
        target_tokens: (M,) flat input token b * T_in + t that each target is.
        next_position: (B,) position of the first token to be generated.
        max_position: the largest position of the batch.
        reuses_clips: placeholders do not take the clips in their order, each once: `sequence_sources` picks.
        packed_questions: how to attend to packed questions as rows of their own; None where nothing is packed.
        plain_causal: memory order alone gives the mask of the sequence (no segments, no padding on the left).
    """

    token_ids: Tensor
    places: TokenMetadata
    sequence_entries: tuple[Tensor, ...]
    sequence_sources: tuple[Tensor, ...]
    beside: dict[tuple[int, ...], AudioTokenLayout]
    input_entries: Tensor
    predictors: Tensor
    targets: Tensor
    target_tokens: Tensor
    next_position: Tensor
    max_position: int
    reuses_clips: bool
    packed_questions: PackedQuestions | None
    plain_causal: bool

    def to(self, device: torch.device) -> Layout:
        if device.type == "cpu":
            return self

        def move(value: Tensor) -> Tensor:
            return to_device(value, device)

        return Layout(
            move(self.token_ids),
            self.places.to(device),
            tuple(map(move, self.sequence_entries)),
            tuple(map(move, self.sequence_sources)),
            {streams: audio.to(device) for streams, audio in self.beside.items()},
            move(self.input_entries),
            move(self.predictors),
            move(self.targets),
            move(self.target_tokens),
            move(self.next_position),
            self.max_position,
            self.reuses_clips,
            None if self.packed_questions is None else self.packed_questions.to(device),
            self.plain_causal,
        )

    def hide(self, streams: Sequence[Stream], integrations: Collection[IntegrationKind]) -> Layout:
        """The same layout, in which no query sees a token of these integrations; no position changes."""
        beside = {
            key: audio.hide() if streams[key[0]].integration in integrations else audio
            for key, audio in self.beside.items()
        }
        if "plits" not in integrations:
            return replace(self, beside=beside)
        places = replace(self.places, valid=self.places.valid & ~self.places.audio)
        return replace(self, beside=beside, places=places, plain_causal=False)


def build_layout(
    input_ids: Tensor,
    attention_mask: Tensor,
    segment_ids: Tensor | None,
    labels: Tensor | None,
    *,
    audio_token_id: int,
    streams: tuple[Stream, ...],
    token_counts: Sequence[Tensor],
    frame_counts: Sequence[Tensor],
    clips: Tensor | None = None,
    pad_left: bool = False,
) -> Layout:
    """Lays out a batch.

    Args:
        input_ids, attention_mask, segment_ids, labels: (B, T_in); padding on either side.
        token_counts: for each stream (num_clips,) audio tokens of each clip.
        frame_counts: for each stream (num_clips,) frames that the tokens were made of.
        clips: (num_placeholders,) clip of each placeholder, row by row; None means in order, each used once.
        pad_left: put the padding of the sequence on the left, for generation.

    Raises:
        UserError: the number of placeholders is not that of the clips.
    """
    valid = attention_mask.bool()
    segment = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
    placeholder = valid & (input_ids == audio_token_id)
    place_row, place_column = placeholder.nonzero(as_tuple=True)
    num_clips = len(token_counts[0]) if token_counts else 0
    if clips is None:
        clips = torch.arange(num_clips)
    if len(clips) != len(place_row):
        raise UserError(
            "input_ids",
            f"hold {len(place_row)} audio placeholders (token {audio_token_id}) for {len(clips)} clips",
            "put one placeholder into a row for each of its clips",
        )
    lines = [
        clip_positions(streams, tuple(int(n[c]) for n in token_counts), tuple(int(n[c]) for n in frame_counts))
        for c in clips.tolist()
    ]
    in_sequence = [i for i, s in enumerate(streams) if s.integration == "plits"]
    on_line = [i for i, s in enumerate(streams) if s.integration != "flamingo"]

    # Width of each input token in positions and in sequence entries, and from there where each begins.
    slots = valid.long()
    entries = valid.long()
    slots[place_row, place_column] = torch.tensor([sum(len(line[i]) for i in on_line) for line in lines]).long()
    entries[place_row, place_column] = torch.tensor([sum(len(line[i]) for i in in_sequence) for line in lines]).long()
    position = _positions(slots, segment, valid)
    lengths = entries.sum(1)
    total = max(int(lengths.max()), 1)
    start = entries.cumsum(1) - entries
    if pad_left:
        start = start + (total - lengths)[:, None]

    batch = len(input_ids)
    out = {name: torch.zeros(batch, total, dtype=torch.long) for name in ("token_ids", "segment", "input")}
    out["position"] = torch.full((batch, total), -1)
    out["labels"] = torch.full((batch, total), IGNORED_LABEL)
    out_valid = torch.zeros(batch, total, dtype=torch.bool)
    out_audio = torch.zeros(batch, total, dtype=torch.bool)
    text_row, text_column = (valid & ~placeholder).nonzero(as_tuple=True)
    text_entry = start[text_row, text_column]
    out["token_ids"][text_row, text_entry] = input_ids[text_row, text_column]
    out["input"][text_row, text_entry] = text_row * input_ids.shape[1] + text_column
    out["position"][text_row, text_entry] = position[text_row, text_column]
    out["segment"][text_row, text_entry] = segment[text_row, text_column]
    if labels is not None:
        out["labels"][text_row, text_entry] = labels[text_row, text_column]
    out_valid[text_row, text_entry] = True

    offsets = [torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in token_counts]  # of each clip in the flat tokens
    flat: list[list[Tensor]] = [[] for _ in streams]  # (n, 4): row, position, segment, source; per placeholder
    sequence_entries: list[list[Tensor]] = [[] for _ in streams]
    for line, clip, row, column in zip(lines, clips.tolist(), place_row.tolist(), place_column.tolist(), strict=True):
        rank = torch.cat([line[i] for i in in_sequence]).argsort().argsort() if in_sequence else torch.empty(0)
        ranks = dict(zip(in_sequence, rank.split([len(line[i]) for i in in_sequence]), strict=True))
        for i, slot in enumerate(line):
            source = offsets[i][clip] + torch.arange(len(slot))
            here = position[row, column] + slot
            place = [torch.full_like(slot, row), here, torch.full_like(slot, int(segment[row, column])), source]
            flat[i].append(torch.stack(place, dim=1))
            if i in ranks:
                entry = start[row, column] + ranks[i]
                out["position"][row, entry] = here
                out["segment"][row, entry] = segment[row, column]
                out_valid[row, entry] = out_audio[row, entry] = True
                sequence_entries[i].append(row * total + entry)

    empty = torch.empty(0, 4, dtype=torch.long)
    flats = [torch.cat(parts) if parts else empty for parts in flat]
    counts = [int(n.sum()) for n in token_counts]
    predictors, target_entries = _targets(out["labels"], out["segment"], out_valid)
    places = TokenMetadata(out["position"], out["segment"], out_valid, out_audio)
    return Layout(
        token_ids=out["token_ids"],
        places=places,
        sequence_entries=tuple(torch.cat(e) if e else empty[:, 0] for e in sequence_entries),
        sequence_sources=tuple(f[:, 3] if s.integration == "plits" else empty[:, 0]
                               for f, s in zip(flats, streams, strict=True)),
        beside={key: arrange_in_rows(key, flats, counts, batch) for key in stream_sets(streams)},
        input_entries=(start + entries - 1).clamp(min=0) + torch.arange(batch)[:, None] * total,
        predictors=predictors,
        targets=out["labels"].flatten()[target_entries],
        target_tokens=out["input"].flatten()[target_entries],
        next_position=torch.where(valid, position + slots, 0).amax(1),
        max_position=int(position.max() + slots.max()) if position.numel() else 0,
        reuses_clips=not torch.equal(clips, torch.arange(num_clips)),
        packed_questions=find_packed_questions(places),
        plain_causal=bool((out["segment"] == 0).all()) and (not pad_left or bool((lengths == total).all())),
    )  # fmt: skip


def _positions(slots: Tensor, segment: Tensor, valid: Tensor) -> Tensor:
    """(B, T_in) first position of every input token; a segment s > 0 begins again at the end of the prefix."""
    position = torch.full_like(slots, -1)
    prefix_end = torch.where(segment == 0, slots, 0).sum(1, keepdim=True)
    for s in segment[valid].unique().tolist():
        here = valid & (segment == s)
        width = torch.where(here, slots, 0)
        first = width.cumsum(1) - width + (prefix_end if s else 0)
        position = torch.where(here, first, position)
    return position


def _targets(labels: Tensor, segment: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of the flat entry that predicts and the flat entry of the token that it must predict.

    A token is predicted by the entry before it in its own segment; the first of a segment by the last entry of the
    prefix, as if its conversation stood alone.
    """
    batch, total = labels.shape
    index = torch.arange(total).expand(batch, total)
    previous = torch.full_like(labels, -1)
    in_prefix = valid & (segment == 0)
    prefix_last = torch.where(in_prefix, index, -1).amax(1, keepdim=True)
    for s in segment[valid].unique().tolist():
        here = valid & (segment == s)
        latest = torch.where(here, index, -1).cummax(1).values
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
        if s:
            before = torch.where(before < 0, prefix_last, before)
        previous = torch.where(here, before, previous)
    row, column = ((labels != IGNORED_LABEL) & valid & (previous >= 0)).nonzero(as_tuple=True)
    return row * total + previous[row, column], row * total + column
