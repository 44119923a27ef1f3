"""Micro-batches as the trainer sees them: how many tokens they hold, and what the model receives."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.core.labels import IGNORE_INDEX

MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "segment_ids", "audio_features", "audio_lengths")
Batch = dict[str, Any]


def count_text_tokens(batch: Batch) -> int:
    """Returns the number of text tokens, without padding and audio placeholders."""
    return int(batch["attention_mask"].sum()) - len(batch["clip_ids"])


def count_answer_tokens(batch: Batch) -> int:
    """Returns the number of tokens that carry a loss."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


def model_inputs(batch: Batch, num_items: float, device: torch.device) -> Batch:
    """Returns the keyword arguments of the model for one micro-batch, with audio features on the device.

    Args:
        num_items: divisor of the summed cross-entropy.
    """
    features = {name: frames.to(device, non_blocking=True) for name, frames in batch["audio_features"].items()}
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    return {**inputs, "audio_features": features, "num_items_in_batch": num_items}
