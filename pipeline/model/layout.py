"""Lays out a batch: the sequence that the language model reads, positions, segments and targets of every row.

Pure functions on CPU tensors. `positions.clip_positions` gives the positions of audio tokens within a clip; this module
places clips and text in rows, and `generation` continues the positions for text behind a prefix and for new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.labels import IGNORE_INDEX
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


@dataclass(frozen=True)
class TextBatch:
    """The text inputs of a forward pass, each (B, T_in); padding on either side.

    Attributes:
        input_ids: token ids, with one placeholder for each clip.
        attention_mask: 1 = real token; None means all are.
        segment_ids: 0 = shared prefix, 1, 2, ... = conversations packed behind it; None means all 0.
        labels: token to predict, -100 where no loss; None means no loss.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    labels: Tensor | None = None

    def cpu(self) -> TextBatch:
        return TextBatch(*(None if x is None else x.cpu() for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class BatchClips:
    """How many audio tokens the clips of a batch have, and which clip each placeholder stands for; all on the CPU.

    Attributes:
        token_counts: for each stream (C,) audio tokens of each clip.
        frame_counts: for each stream (C,) frames that the tokens were made of.
        of_placeholder: (num_placeholders,) clip of each placeholder, row by row; None means in order, each used once.
    """

    token_counts: Sequence[Tensor]
    frame_counts: Sequence[Tensor]
    of_placeholder: Tensor | None = None

    @property
    def num_clips(self) -> int:
        return len(self.token_counts[0]) if self.token_counts else 0


@dataclass(frozen=True)
class Layout:
    """A batch as the language model reads it: B rows of T sequence entries.

    Attributes:
        token_ids: (B, T) text tokens; 0 where an entry is audio or padding.
        metadata: metadata of the sequence entries, (B, T).
        sequence_entries: for each stream the flat entries b * T + t that its tokens take (PLITS; else empty).
        sequence_sources: for each stream the flat tokens that go there.
        audio_layouts: stream indices -> the tokens that they put beside the sequence (LAL, flamingo).
        input_entries: (B, T_in) for each input token, flat index b * T + t of the hidden state that predicts the token
            after this input token; for a placeholder and for padding the entry before what follows.
        predictors: (M,) flat entries b * T + t that carry loss.
        targets: (M,) the token that each of them must predict.
        target_tokens: (M,) flat input token b * T_in + t that each target is.
        next_position: (B,) position of the first token to be generated.
        max_position: the largest position of the batch.
        reuses_clips: placeholders do not take the clips in their order, each once: `sequence_sources` selects.
        packed_questions: where packed questions are, to attend as rows of their own; None where nothing is packed.
        plain_causal: storage order in the tensor alone gives the mask of the sequence (no segments, no left padding).
    """

    token_ids: Tensor
    metadata: TokenMetadata
    sequence_entries: tuple[Tensor, ...]
    sequence_sources: tuple[Tensor, ...]
    audio_layouts: dict[tuple[int, ...], AudioTokenLayout]
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
            self.metadata.to(device),
            tuple(map(move, self.sequence_entries)),
            tuple(map(move, self.sequence_sources)),
            {streams: audio.to(device) for streams, audio in self.audio_layouts.items()},
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
        """Returns the same layout with the tokens of these integrations masked from every query; positions stay."""
        audio_layouts = {
            key: audio.hide() if streams[key[0]].integration in integrations else audio
            for key, audio in self.audio_layouts.items()
        }
        if "plits" not in integrations:
            return replace(self, audio_layouts=audio_layouts)
        metadata = replace(self.metadata, valid=self.metadata.valid & ~self.metadata.audio)
        return replace(self, audio_layouts=audio_layouts, metadata=metadata, plain_causal=False)


def build_layout(
    text: TextBatch, clips: BatchClips, streams: tuple[Stream, ...], audio_token_id: int, *, pad_left: bool = False
) -> Layout:
    """Lays out a batch.

    Args:
        text: inputs on the CPU.
        pad_left: put the padding of the sequence on the left, for generation.

    Raises:
        UserError: the number of placeholders is not that of the clips.
    """
    input_ids, labels = text.input_ids, text.labels
    valid = torch.ones_like(input_ids).bool() if text.attention_mask is None else text.attention_mask.bool()
    segment = torch.zeros_like(input_ids) if text.segment_ids is None else text.segment_ids
    placeholder = valid & (input_ids == audio_token_id)
    clip_row, clip_column = placeholder.nonzero(as_tuple=True)
    clip = torch.arange(clips.num_clips) if clips.of_placeholder is None else clips.of_placeholder
    if len(clip) != len(clip_row):
        raise UserError(
            "input_ids",
            f"hold {len(clip_row)} audio placeholders (token {audio_token_id}) for {len(clip)} clips",
            "put one placeholder into a row for each of its clips",
        )
    clip_offsets = [  # positions of each clip's tokens, counted from the start of the clip
        clip_positions(
            streams, tuple(int(n[c]) for n in clips.token_counts), tuple(int(n[c]) for n in clips.frame_counts)
        )
        for c in clip.tolist()
    ]
    in_sequence = [i for i, s in enumerate(streams) if s.integration == "plits"]
    positioned = [i for i, s in enumerate(streams) if s.integration != "flamingo"]

    def total_tokens(chosen: Sequence[int]) -> Tensor:
        """Returns the tokens of these streams that each placeholder stands for."""
        return torch.tensor([sum(len(offsets[i]) for i in chosen) for offsets in clip_offsets]).long()

    # Width of each input token in positions and in sequence entries; their running sums are where each begins.
    widths = valid.long()
    entries = valid.long()
    widths[clip_row, clip_column] = total_tokens(positioned)
    entries[clip_row, clip_column] = total_tokens(in_sequence)
    position = _positions(widths, segment, valid)
    lengths = entries.sum(1)
    total = max(int(lengths.max()), 1)
    start = entries.cumsum(1) - entries
    if pad_left:
        start = start + (total - lengths)[:, None]

    batch = len(input_ids)
    out = {name: torch.zeros(batch, total, dtype=torch.long) for name in ("token_ids", "segment", "input")}
    out["position"] = torch.full((batch, total), -1)
    out["labels"] = torch.full((batch, total), IGNORE_INDEX)
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

    first_token = [torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in clips.token_counts]  # flat, of each clip
    tables: list[list[Tensor]] = [[] for _ in streams]  # (tokens, 4), see `arrange_in_rows`; one for each placeholder
    sequence_entries: list[list[Tensor]] = [[] for _ in streams]
    for offsets, c, row, column in zip(
        clip_offsets, clip.tolist(), clip_row.tolist(), clip_column.tolist(), strict=True
    ):
        rank = torch.cat([offsets[i] for i in in_sequence]).argsort().argsort() if in_sequence else torch.empty(0)
        ranks = dict(zip(in_sequence, rank.split([len(offsets[i]) for i in in_sequence]), strict=True))
        for i, offset in enumerate(offsets):
            source = first_token[i][c] + torch.arange(len(offset))
            absolute = position[row, column] + offset
            token_segment = torch.full_like(offset, int(segment[row, column]))
            columns = [torch.full_like(offset, row), absolute, token_segment, source]
            tables[i].append(torch.stack(columns, dim=1))
            if i in ranks:
                entry = start[row, column] + ranks[i]
                out["position"][row, entry] = absolute
                out["segment"][row, entry] = segment[row, column]
                out_valid[row, entry] = out_audio[row, entry] = True
                sequence_entries[i].append(row * total + entry)

    empty = torch.empty(0, 4, dtype=torch.long)
    joined = [torch.cat(parts) if parts else empty for parts in tables]
    counts = [int(n.sum()) for n in clips.token_counts]
    predictors, target_entries = _targets(out["labels"], out["segment"], out_valid)
    metadata = TokenMetadata(out["position"], out["segment"], out_valid, out_audio)
    return Layout(
        token_ids=out["token_ids"],
        metadata=metadata,
        sequence_entries=tuple(torch.cat(e) if e else empty[:, 0] for e in sequence_entries),
        sequence_sources=tuple(table[:, 3] if s.integration == "plits" else empty[:, 0]
                               for table, s in zip(joined, streams, strict=True)),
        audio_layouts={key: arrange_in_rows(key, joined, counts, batch) for key in stream_sets(streams)},
        input_entries=(start + entries - 1).clamp(min=0) + torch.arange(batch)[:, None] * total,
        predictors=predictors,
        targets=out["labels"].flatten()[target_entries],
        target_tokens=out["input"].flatten()[target_entries],
        next_position=torch.where(valid, position + widths, 0).amax(1),
        max_position=int(position.max() + widths.max()) if position.numel() else 0,
        reuses_clips=not torch.equal(clip, torch.arange(clips.num_clips)),
        packed_questions=find_packed_questions(metadata),
        plain_causal=bool((out["segment"] == 0).all()) and (not pad_left or bool((lengths == total).all())),
    )  # fmt: skip


def _positions(widths: Tensor, segment: Tensor, valid: Tensor) -> Tensor:
    """Returns the (B, T_in) first position of every input token; each segment s > 0 starts at the end of the prefix."""
    position = torch.full_like(widths, -1)
    prefix_end = torch.where(segment == 0, widths, 0).sum(1, keepdim=True)
    for s in segment[valid].unique().tolist():
        in_segment = valid & (segment == s)
        width = torch.where(in_segment, widths, 0)
        first = width.cumsum(1) - width + (prefix_end if s else 0)
        position = torch.where(in_segment, first, position)
    return position


def _targets(labels: Tensor, segment: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the flat entries that predict, and the flat entries of the tokens that they must predict.

    A token is predicted by the entry before it in its own segment; the first of a segment by the last entry of the
    prefix, as if its conversation stood alone.
    """
    batch, total = labels.shape
    index = torch.arange(total).expand(batch, total)
    predictor = torch.full_like(labels, -1)
    in_prefix = valid & (segment == 0)
    prefix_last = torch.where(in_prefix, index, -1).amax(1, keepdim=True)
    for s in segment[valid].unique().tolist():
        in_segment = valid & (segment == s)
        latest = torch.where(in_segment, index, -1).cummax(1).values
        previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
        if s:
            previous = torch.where(previous < 0, prefix_last, previous)
        predictor = torch.where(in_segment, previous, predictor)
    row, column = ((labels != IGNORE_INDEX) & valid & (predictor >= 0)).nonzero(as_tuple=True)
    return row * total + predictor[row, column], row * total + column
