"""Size of a run: the model's parameters, counted on torch's meta device, and the rows and steps of its data."""

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
from pipeline.cost.flops import RowShape, training_flops, whole_time_steps
from pipeline.data.chat_template import build_chat_template
from pipeline.data.feature_set import open_feature_set
from pipeline.engine import parameter_groups
from pipeline.model import PalConfig, PalForCausalLM, add_lora, set_trainable
from pipeline.model.language_models import language_model_config, published_shape

SAMPLED_CLIPS = 256


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model that was built without weights.

    Attributes:
        groups: elements of each trained parameter, by parameter group.
        frozen: elements of each parameter that is not trained.
    """

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
    """Builds the model of a config on the meta device and counts its parameters.

    Raises:
        UserError: the language model lacks a layer that the config names, or the workload lacks an encoder.
    """
    for name in config.model.encoders:
        if name not in workload.encoders:
            known = ", ".join(workload.encoders)
            raise UserError("model.encoders", f"'{name}' is not in the workload ({known})", "change one of the two")
    return _model_size(_SizeSettings(config.model, config.train, workload.encoders))


class _SizeSettings:
    """Settings that the size of a model depends on; equal by value, so that a search builds each model once."""

    def __init__(self, model: ModelConfig, train: TrainConfig, encoders: dict[str, EncoderCost]) -> None:
        self.model, self.train, self.encoders = model, train, encoders
        shapes = {name: (encoder.width, encoder.grid) for name, encoder in encoders.items()}
        self.key = repr((model, train.trainable, train.lora, shapes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SizeSettings) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)
def _model_size(settings: _SizeSettings) -> ModelSize:
    model_config, train, encoders = settings.model, settings.train, settings.encoders
    name = model_config.language_model
    language_model = published_shape(name) or language_model_config(name)
    config = PalConfig(
        language_model,
        model_config.resolve_streams(language_model.num_hidden_layers),
        {name: encoders[name].width for name in model_config.encoders},
        encoder_grids={name: grid for name in model_config.encoders if (grid := encoders[name].grid)},
        norm_audio_tokens=model_config.norm_audio_tokens,
        audio_queries=model_config.audio_queries,
    )
    with torch.device("meta"):
        model = PalForCausalLM(config)
        if train.lora is not None:
            add_lora(model, **train.lora.model_dump())
        set_trainable(model, train.trainable)
    groups = [tuple(p.numel() for p in g.parameters) for g in parameter_groups(model, train)]
    frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
    return ModelSize(config, tuple(group for group in groups if group), frozen)


def measure_workload(config: ExperimentConfig) -> WorkloadConfig:
    """Measures the training set that a config names: counts its selected questions, and averages over a sample.

    Raises:
        UserError: the set does not exist, or lacks an encoder of the model.
    """
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    _, chat_template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    selected = features.table.select(config.data.tasks, config.data.datasets)
    sample = features.table.clip[selected[np.linspace(0, len(selected) - 1, SAMPLED_CLIPS).astype(np.int64)]]
    rows = [chat_template.row(features.clip(int(clip)).questions[:1]) for clip in sample]
    system_tokens = len(chat_template.prefix) - 1  # without the placeholder
    return WorkloadConfig(
        clips=len(np.unique(features.table.clip[selected])),
        questions=len(selected),
        clip_s=float(np.mean(features.table.duration_s[sample])),
        encoders={
            name: EncoderCost(frame_rate_hz=e.frame_rate_hz, width=e.width, grid=e.grid)
            for name, e in contract.encoders.items()
        },
        system_tokens=system_tokens,
        question_tokens=max(1, round(float(np.mean([len(row.input_ids) - system_tokens - 1 for row in rows])))),
        answer_tokens=max(1, round(float(np.mean([(row.labels >= 0).sum() for row in rows])))),
    )


def row_shape(config: ExperimentConfig, workload: WorkloadConfig) -> RowShape:
    """Returns the mean row of a batch."""
    questions = config.data.questions_per_sequence
    loss_tokens = workload.answer_tokens if config.train.loss_on == "answer" else workload.question_tokens
    frames = {name: mean_frames(workload, name) for name in config.model.encoders}
    return RowShape(workload.system_tokens, [workload.question_tokens] * questions, loss_tokens * questions, frames)


def mean_frames(workload: WorkloadConfig, name: str) -> int:
    """Returns the frames of one encoder for a clip of mean duration."""
    encoder = workload.encoders[name]
    return whole_time_steps(round(workload.clip_s * encoder.frame_rate_hz), encoder.grid)


def step_tokens(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Returns the text tokens of one optimizer step."""
    packed = config.data.questions_per_sequence
    sequences = config.train.global_batch_size / packed
    return sequences * (workload.system_tokens + packed * workload.question_tokens)


def run_flops(config: ExperimentConfig, workload: WorkloadConfig) -> float:
    """Returns the floating-point operations of the whole run."""
    flops = training_flops(model_size(config, workload).config, row_shape(config, workload), config.train.trainable)
    sequences = config.train.global_batch_size / config.data.questions_per_sequence
    return float(flops * sequences * total_steps(config, workload))


def total_steps(config: ExperimentConfig, workload: WorkloadConfig) -> int:
    """Returns the optimizer steps of the whole run."""
    train = config.train
    if train.tokens is not None:
        return math.ceil(train.tokens / step_tokens(config, workload))
    per_epoch = math.ceil(workload.questions / train.global_batch_size)
    return train.steps or math.ceil((train.epochs or 0) * per_epoch)
