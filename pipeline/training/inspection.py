"""Training data for people: the sequences of a config as the model gets them, as rows of JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from pipeline.config import ExperimentConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question, load_contract, require_encoders
from pipeline.core.labels import IGNORE_INDEX
from pipeline.core.ranks import Ranks
from pipeline.core.transcript import Part, Style, field_lines, visible
from pipeline.data.chat_template import build_chat_template
from pipeline.data.collate import Example
from pipeline.data.feature_set import Clip, FeatureSet
from pipeline.data.inspection import (
    ClipIndex,
    counted,
    describe_audio,
    describe_frames,
    describe_question,
    question_row,
)
from pipeline.data.loader import TrainingLoader
from pipeline.data.sampler import Ints, PackedExample
from pipeline.data.template_parts import describe_system_text
from pipeline.model.language_models import language_model_config
from pipeline.training.build import audio_positions, check_questions

_EXAMPLES_AT_ONCE = 256


class TrainingData:
    """The data of a training config; its entries are sequences.

    Args:
        config: a training, or one stage of it.
        epoch: the epoch whose order the entries have; None means storage order, with one question per sequence.

    Raises:
        UserError: data, language model and config do not match.
    """

    unit = "sequences"

    def __init__(self, config: ExperimentConfig, epoch: int | None) -> None:
        self.config, self._epoch = config, epoch
        name, contract = config.model.language_model, load_contract(config.data.train)
        require_encoders(contract, config.model.encoders, config.data.train)
        self.tokenizer, self.chat_template = build_chat_template(name, config.data, config.train.loss_on)
        checked = check_questions(config, self.chat_template)
        self.num_unfit = checked.num_unfit
        self.sets = [checked.train, *checked.mixture]
        bounded_positions = audio_positions(config, contract)
        self.loader = TrainingLoader(
            self.sets, self.chat_template, config.data, config.train, Ranks(0, 1, 0, 1), bounded_positions
        )
        data = config.data
        self.selections = [checked.train.table.select(data.tasks, data.datasets)]
        for number, (mixed_set, mixed) in enumerate(zip(checked.mixture, data.mixture, strict=True)):
            self.selections.append(mixed_set.table.select(mixed.tasks, mixed.datasets, f"data.mixture.{number}"))
        self.indices = [ClipIndex(feature_set) for feature_set in self.sets]
        self.audio_positions = audio_positions(config, contract, ("plits", "lal"))
        self.max_positions: int | None = getattr(language_model_config(name), "max_position_embeddings", None)

    def summary(self, style: Style) -> str:
        """Returns what is trained on, and how the text is marked."""
        packed, examples = self.config.data.questions_per_sequence, self.loader.sampler.examples_per_epoch
        selected = sum(map(len, self.selections))
        max_tokens = self.config.data.max_text_tokens
        limit = "no limit" if self.max_positions is None else f"{self.max_positions:,}"
        order = "storage order; --epoch 0 shows the sequences of training, in their order"
        fields = {
            "data": ", ".join(dict.fromkeys(str(feature_set.folder) for feature_set in self.sets)),
            "questions": f"{selected:,} selected; an epoch has {counted(examples, 'sequence')} of up to {packed}",
            "left out": f"{counted(self.num_unfit, 'question')} that do not fit; pal train lists them"
            if self.num_unfit
            else "",
            "order": order if self._epoch is None else f"that of training, epoch {self._epoch}",
            "system": describe_system_text(self.tokenizer, self.config.data.system_prompt) or "",
            "bounds": f"data.max_text_tokens {max_tokens:,}; the language model's positions: {limit}",
            "marks": f"⟨audio⟩ is the place of a clip; tokens with loss are {style.legend}",
        }
        heading = f"{self.config.model.language_model}, {self.config.model.integration}"
        lines = [field_lines(label, text, style) for label, text in fields.items() if text]
        return "\n".join([style.heading(heading), *lines])

    def entries(self, clip_id: str | None) -> tuple[int, Iterator[TrainingSequence]]:
        """Returns the number of entries, and the entries: all, or those of one clip.

        Raises:
            UserError: there is no such clip, or none of its questions is selected.
        """
        examples = (TrainingSequence(self, number, example) for number, example in enumerate(self._examples()))
        if clip_id is None:
            in_epoch, stored = self.loader.sampler.examples_per_epoch, sum(map(len, self.selections))
            return stored if self._epoch is None else in_epoch, examples
        sources = [number for number, index in enumerate(self.indices) if clip_id in index] or [0]
        clips = {number: self.indices[number].find(clip_id) for number in sources}
        chosen = [entry for entry in examples if clips.get(entry.packed.source) == entry.packed.clip]
        if not chosen:
            remedy = "see its questions in its feature set, or widen data.tasks and data.datasets"
            raise UserError(f"clip '{clip_id}'", "has no question that the config selects", remedy)
        return len(chosen), iter(chosen)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, with control tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _examples(self) -> Iterator[PackedExample]:
        if self._epoch is None:
            for source, (feature_set, selected) in enumerate(zip(self.sets, self.selections, strict=True)):
                for question in selected:
                    yield PackedExample(int(feature_set.table.clip[question]), np.array([question]), source)
            return
        sampler = self.loader.sampler
        start, stop = (epoch * sampler.examples_per_epoch for epoch in (self._epoch, self._epoch + 1))
        for position in range(start, stop, _EXAMPLES_AT_ONCE):
            yield from sampler.packed_examples(position, min(stop, position + _EXAMPLES_AT_ONCE))


@dataclass(frozen=True)
class TrainingSequence:
    """One row of a batch, before padding.

    Attributes:
        number: position in the order that is shown.
    """

    source: TrainingData
    number: int
    packed: PackedExample

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row for each question: as stored, with the tokens that it attends to and their labels."""
        example = self._example()
        rows = []
        for question, columns in zip(example.questions, _conversations(example), strict=True):
            ids, labels = example.row.input_ids[columns].tolist(), example.row.labels[columns].tolist()
            row = question_row(question, self._clip, self._clips(question))
            rendered = self.source.decode(ids)
            rows.append({**row, "sequence": self.number, "input_ids": ids, "labels": labels, "rendered": rendered})
        return rows

    def text(self, style: Style) -> str:
        """Returns the sequence for the console; what its questions share comes first."""
        example, clip = self._example(), self._clip
        lines = [style.heading(f"sequence {self.number}: clip {clip.clip_id}")]
        if len(self.source.sets) > 1:
            lines.append(field_lines("set", str(self._features.folder), style))
        lines.append(field_lines("source", visible(f"dataset {clip.dataset}, domain {clip.domain}"), style))
        lengths: dict[str, str] = {}  # id of a clip -> its length and frames
        for other, features in [(example.clip, example.features), *example.other_clips]:
            if other is not None:
                frames = describe_frames({name: len(array) for name, array in features.items()})
                lengths[other.clip_id] = f"{describe_audio(other)}, {frames}"
        names = {clip_id: f"audio {number}" for number, clip_id in enumerate(lengths, start=1)}
        if len(names) == 1:
            names = dict.fromkeys(names, "audio")
        lines += [field_lines(name, lengths[clip_id], style) for clip_id, name in names.items()]
        places = self._places(example)
        for number, (question, columns) in enumerate(zip(example.questions, _conversations(example), strict=True)):
            shared, parts = self._parts(
                example, columns, [names[places[column].clip_id] for column in columns if column in places]
            )
            if shared and not number:
                lines.append(field_lines("shared", style.conversation(shared), style))
            lines += ["", f"  {style.heading(question.question_id)}  {describe_question(question)}"]
            lines.append(field_lines("text", style.conversation(parts), style, 4))
            spelled = self._spelled_tokens(example.row.input_ids[columns])
            if spelled:
                lines.append(
                    field_lines("note", f"plain text here, not tokens: {visible(' '.join(spelled))}", style, 4)
                )
            lines.append(field_lines("tokens", self._count(example, columns, places), style, 4))
        return "\n".join(lines)

    def _example(self) -> Example:
        return self.source.loader.example(self.packed)

    @property
    def _features(self) -> FeatureSet:
        return self.source.sets[self.packed.source]

    @cached_property
    def _clip(self) -> Clip:
        return self._features.clip(self.packed.clip)

    def _clips(self, question: Question) -> list[Clip]:
        return self.source.indices[self.packed.source].clips_of(self._clip, question)

    def _places(self, example: Example) -> dict[int, Clip]:
        """Returns column -> clip for each placeholder of the row."""
        columns = np.flatnonzero(example.row.input_ids == self.source.chat_template.audio_token_id).tolist()
        clips = [] if example.clip is None else [example.clip, *(clip for clip, _ in example.other_clips)]
        return dict(zip(columns, clips, strict=True))

    def _parts(self, example: Example, columns: Ints, names: Sequence[str]) -> tuple[list[Part], list[Part]]:
        """Returns the text that a question shares with the others of its sequence, and its own.

        Args:
            columns: the columns of the row that the question attends to.
            names: what stands at each placeholder.
        """
        ids, labels = example.row.input_ids[columns], example.row.labels[columns]
        is_shared = (example.row.segment_ids[columns] == 0) & (len(example.questions) > 1)
        is_audio = ids == self.source.chat_template.audio_token_id
        kinds = zip(is_shared, np.where(is_audio, np.arange(len(ids)), -1), labels != IGNORE_INDEX, strict=True)
        places = iter(names)
        shared: list[Part] = []
        own: list[Part] = []
        end, text = 0, ""
        for (in_shared, place, loss), run in groupby(kinds):
            end += len(list(run))
            # Some tokenizers drop a space at the beginning of a text, so every piece is cut out of the whole.
            start, text = len(text), self.source.decode(ids[:end].tolist())
            part = Part(next(places), audio=True) if place >= 0 else Part(text[start:], loss=bool(loss))
            (shared if in_shared else own).append(part)
        return shared, own

    def _spelled_tokens(self, ids: Ints) -> list[str]:
        """Returns the control tokens that the text of a question spells, which look like real ones."""
        text = self.source.decode(ids.tolist())
        tokens = {str(token): index for index, token in self.source.tokenizer.added_tokens_decoder.items()}
        return [token for token, index in tokens.items() if text.count(token) > int((ids == index).sum())]

    def _count(self, example: Example, columns: Ints, places: Mapping[int, Clip]) -> str:
        """Returns the tokens and positions of a question, beside their bounds."""
        source, ids = self.source, example.row.input_ids[columns]
        loss = int((example.row.labels[columns] != IGNORE_INDEX).sum())
        clips = [places[column] for column in columns if column in places]
        audio = sum(source.audio_positions(clip.duration_s) for clip in clips)
        positions = len(ids) - len(clips) + audio
        text = f"{len(ids):,} of data.max_text_tokens {source.config.data.max_text_tokens:,}, {loss:,} with loss"
        limit = "" if source.max_positions is None else f" of {source.max_positions:,}"
        return f"{text}; {positions:,}{limit} positions with audio" if clips else text


def _conversations(example: Example) -> list[Ints]:
    """Returns the columns that each question attends to: what all share, and its own segment."""
    segments = example.row.segment_ids
    if len(example.questions) == 1:
        return [np.arange(len(segments))]
    return [np.flatnonzero((segments == 0) | (segments == number)) for number in range(1, len(example.questions) + 1)]
