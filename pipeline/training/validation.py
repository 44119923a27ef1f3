"""The loss on held-out questions during training."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.config import DataConfig, ExperimentConfig
from pipeline.core.ranks import Ranks
from pipeline.data.feature_set import FeatureSet
from pipeline.data.loader import evaluation_batches
from pipeline.training.batches import count_answer_tokens, model_inputs
from pipeline.training.build import Components


def validation_loss(components: Components, features: FeatureSet, config: ExperimentConfig, ranks: Ranks) -> float:
    """Returns the mean loss of an answer token on held-out questions. All ranks call it."""
    engine = components.engine
    batches = evaluation_batches(
        features,
        components.chat_template,
        validation_questions(features, config.data),
        config.train,
        ranks,
        components.audio_positions,
    )
    loss = torch.zeros((), device=engine.device, dtype=torch.float64)
    answer_tokens = 0
    with engine.evaluating():
        for batch in batches:
            loss += engine.forward(model_inputs(batch, 1.0, engine.device))
            answer_tokens += count_answer_tokens(batch)
        total_loss, total_tokens = engine.sum_over_ranks([float(loss), answer_tokens])
    return total_loss / total_tokens


def validation_questions(features: FeatureSet, data: DataConfig) -> np.ndarray:
    """Returns indices of the questions for the validation loss, spread evenly over the set."""
    selected = features.table.select(data.tasks, data.datasets)
    count = min(len(selected), data.validation_questions)
    return selected[np.linspace(0, len(selected) - 1, count).astype(np.int64)]
