"""Collates rows of token ids and the features of their clips into one batch in the form the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.feature_contract import Question
from pipeline.core.labels import IGNORE_INDEX
from pipeline.data.chat_template import Row
from pipeline.data.feature_set import Clip

Batch = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row of a batch.

    Attributes:
        row: token ids, labels and segments.
        questions: the questions in the row.
        clip: the clip of the first placeholder; None for a row of text only.
        features: encoder -> (frames, width); empty for a row of text only.
        other_clips: the clips of the other placeholders, in order, with their features.
    """

    row: Row
    questions: Sequence[Question]
    clip: Clip | None
    features: Mapping[str, NDArray[np.float16]]
    other_clips: Sequence[tuple[Clip, Mapping[str, NDArray[np.float16]]]] = ()


def collate(
    examples: Sequence[Example], *, pad_token_id: int, widths: Mapping[str, int], feature_dtype: torch.dtype
) -> Batch:
    """Builds a batch of B rows, padded on the right to the T tokens of the longest.

    Args:
        pad_token_id: fills input_ids where attention_mask is 0.
        widths: encoder -> width of its frames, needed for batches without a clip.
        feature_dtype: dtype of the audio features; float32 and float16 are converted directly from the shard's bytes.

    Returns:
        input_ids, attention_mask, labels (-100 where there is no loss), segment_ids: (B, T) int64. audio_features:
        encoder -> (total frames, width), the clips concatenated without padding. audio_lengths: encoder -> (clips,)
        int64. For the host: question_ids and tasks, one entry per question, row by row; clip_ids and audio_s, one entry
        per placeholder.
    """
    shape = (len(examples), max(len(example.row.input_ids) for example in examples))
    tokens = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, IGNORE_INDEX, np.int64),
        "segment_ids": np.zeros(shape, np.int64),
    }
    for number, example in enumerate(examples):
        columns = np.s_[number, : len(example.row.input_ids)]
        tokens["input_ids"][columns] = example.row.input_ids
        tokens["attention_mask"][columns] = 1
        tokens["labels"][columns] = example.row.labels
        tokens["segment_ids"][columns] = example.row.segment_ids

    with_audio = [
        pair
        for example in examples
        if example.clip is not None
        for pair in ((example.clip, example.features), *example.other_clips)
    ]
    questions = [question for example in examples for question in example.questions]
    return {
        **{name: torch.from_numpy(values) for name, values in tokens.items()},
        "audio_features": {
            name: _concatenate([features[name] for _, features in with_audio], width, feature_dtype)
            for name, width in widths.items()
        },
        "audio_lengths": {
            name: torch.tensor([len(features[name]) for _, features in with_audio], dtype=torch.int64)
            for name in widths
        },
        "question_ids": [question.question_id for question in questions],
        "tasks": [question.task for question in questions],
        "clip_ids": [clip.clip_id for clip, _ in with_audio],
        "audio_s": [float(clip.duration_s) for clip, _ in with_audio],
    }


def _concatenate(arrays: Sequence[NDArray[np.float16]], width: int, dtype: torch.dtype) -> torch.Tensor:
    # One copy out of the read-only shard bytes; numpy has no bfloat16, so bfloat16 takes a second copy.
    numpy_dtype = np.float32 if dtype is torch.float32 else np.float16
    frames = np.concatenate([np.empty((0, width), numpy_dtype), *arrays], dtype=numpy_dtype, casting="same_kind")
    return torch.from_numpy(frames).to(dtype)
