"""What a run works on: the model's parameters, counted on torch's meta device, and the rows and steps of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from pipeline.config import ExperimentConfig, ModelConfig, TrainConfig
from pipeline.config.cluster import EncoderCost, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import load_contract, require_encoders
from pipeline.cost.flops import RowShape, training_flops
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import open_feature_set
from pipeline.engine import parameter_groups
from pipeline.model import PalConfig, PalForCausalLM, add_lora, set_trainable
from pipeline.model.language_models import language_model_config, published_shape

SAMPLED_CLIPS = 256


@dataclass(frozen=True)
class ModelSize:
    """A model without weights: elements of its parameters, trained ones by parameter group."""

    config: PalConfig
    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]

    @property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        return self.trained + sum(self.frozen)


def model_size(config: ExperimentConfig, workload: WorkloadConfig) -> ModelSize:
    """Builds the model of a config on the meta device and counts.

    Raises:
        UserError: layers that the language model does not have, or an encoder that the workload does not know.
    """
    for name in config.model.encoders:
        if name not in workload.encoders:
            known = ", ".join(workload.encoders)
            raise UserError("model.encoders", f"'{name}' is not in the workload ({known})", "change one of the two")
    return _model_size(_Sized(config.model, config.train, workload.encoders))


class _Sized:
    """What the size of a model depends on; equal by value, so that a search builds each model once."""

    def __init__(self, model: ModelConfig, train: TrainConfig, encoders: dict[str, EncoderCost]) -> None:
        self.model, self.train, self.encoders = model, train, encoders
        shapes = {name: (work.width, work.grid) for name, work in encoders.items()}
        self.key = repr((model, train.trainable, train.lora, shapes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Sized) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)
def _model_size(sized: _Sized) -> ModelSize:
    settings, encoders = sized.model, sized.encoders
    name = settings.language_model
    language_model = published_shape(name) or language_model_config(name)
    config = PalConfig(
        language_model,
        settings.resolve_streams(language_model.num_hidden_layers),
        {name: encoders[name].width for name in settings.encoders},
        encoder_grids={name: grid for name in settings.encoders if (grid := encoders[name].grid)},
        norm_audio_tokens=settings.norm_audio_tokens,
        audio_queries=settings.audio_queries,
    )
    with torch.device("meta"):
        model = PalForCausalLM(config)
        if sized.train.lora is not None:
            add_lora(model, **sized.train.lora.model_dump())
        set_trainable(model, sized.train.trainable)
    groups = [tuple(p.numel() for p in g.parameters) for g in parameter_groups(model, sized.train)]
    frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelSize(config, tuple(g for g in groups if g), frozen)


def measure_workload(config: ExperimentConfig) -> WorkloadConfig:
    """The size of the training data that a config names: counts of its selected questions, lengths of a sample.

    Raises:
        UserError: the set does not exist or does not hold the encoders.
    """
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    _, chat = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    selected = features.table.select(config.data.tasks, config.data.datasets)
    sample = features.table.clip[selected[np.linspace(0, len(selected) - 1, SAMPLED_CLIPS).astype(np.int64)]]
    rows = [chat.row(features.clip(int(clip)).questions[:1]) for clip in sample]
    before = len(chat.prefix) - 1  # without the placeholder
    return WorkloadConfig(
        clips=len(np.unique(features.table.clip[selected])),
        questions=len(selected),
        clip_s=float(np.mean(features.table.duration_s[sample])),
        encoders={
            name: EncoderCost(frame_rate_hz=e.frame_rate_hz, width=e.width, grid=e.grid)
            for name, e in contract.encoders.items()
        },
        system_tokens=before,
        question_tokens=max(1, round(float(np.mean([len(row.input_ids) - before - 1 for row in rows])))),
        answer_tokens=max(1, round(float(np.mean([(row.labels >= 0).sum() for row in rows])))),
    )


def row_shape(config: ExperimentConfig, workload: WorkloadConfig) -> RowShape:
    """The mean row of a batch."""
    questions = config.data.questions_per_sequence
    carries_loss = workload.answer_tokens if config.train.loss_on == "answer" else workload.question_tokens
    frames = {n: round(workload.clip_s * workload.encoders[n].frame_rate_hz) for n in config.model.encoders}
    return RowShape(workload.system_tokens, [workload.question_tokens] * questions, carries_loss * questions, frames)


def step_tokens(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Text tokens of an optimizer step."""
    packed = config.data.questions_per_sequence
    sequences = config.train.global_batch_size / packed
    return sequences * (workload.system_tokens + packed * workload.question_tokens)


def run_flops(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Operations of the whole run."""
    flops = training_flops(model_size(config, workload).config, row_shape(config, workload), config.train.trainable)
    sequences = config.train.global_batch_size / config.data.questions_per_sequence
    return float(flops * sequences * total_steps(config, workload))


def total_steps(config: ExperimentConfig, workload: WorkloadConfig) -> int:
    """Optimizer steps of the run."""
    train = config.train
    if train.tokens is not None:
        return math.ceil(train.tokens / step_tokens(config, workload))
    per_epoch = math.ceil(workload.questions / train.global_batch_size)
    return train.steps or math.ceil((train.epochs or 0) * per_epoch)
