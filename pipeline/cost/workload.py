"""Size of a run: the model's parameters, counted on torch's meta device, and the rows and steps of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import DataConfig, ExperimentConfig, MixtureConfig, ModelConfig, TrainConfig
from pipeline.config.cluster import EncoderCost, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import load_contract, require_encoders
from pipeline.cost.flops import RowShape, training_flops, whole_time_steps
from pipeline.data.chat_template import ChatTemplate, build_chat_template
from pipeline.data.feature_set import FeatureSet, open_feature_set, open_mixture
from pipeline.engine import parameter_groups
from pipeline.model import PalConfig, PalForCausalLM, add_lora, set_trainable
from pipeline.model.language_models import language_model_config, published_shape

SAMPLED_QUESTIONS = 256


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


@dataclass(frozen=True)
class _SampledQuestions:
    """Means over a sample of the questions of one set.

    Attributes:
        share: share of all sequences.
        clip_s: mean duration of their clips; 0 in a set of text.
    """

    share: float
    clip_s: float
    question_tokens: float
    answer_tokens: float


def measure_workload(config: ExperimentConfig) -> WorkloadConfig:
    """Measures the sets that a config names: counts the selected questions, and averages over a sample of each set.

    Raises:
        UserError: a set does not exist, or lacks an encoder of the model.
    """
    data = config.data
    contract = load_contract(data.train)
    require_encoders(contract, config.model.encoders, data.train)
    features = open_feature_set(data.train, config.model.encoders, data)
    _, chat_template = build_chat_template(config.model.language_model, data, config.train.loss_on)
    selected = features.table.select(data.tasks, data.datasets)
    first_share = 1 - sum(mixed.share for mixed in data.mixture)
    samples = [_sample(features, selected, chat_template, first_share)]
    for number, (mixed_set, mixed) in enumerate(zip(open_mixture(features, data), data.mixture, strict=True)):
        chosen = mixed_set.table.select(mixed.tasks, mixed.datasets, f"data.mixture.{number}")
        samples.append(_sample(mixed_set, chosen, chat_template, mixed.share))
    return WorkloadConfig(
        clips=len(np.unique(features.table.clip[selected])),
        questions=round(len(selected) / first_share),
        clip_s=sum(sample.share * sample.clip_s for sample in samples),
        encoders={
            name: EncoderCost(
                frame_rate_hz=e.frame_rate_hz,
                width=e.width,
                grid=e.grid,
                window_s=e.window_s,
                gflop_per_encoded_s=0.0 if e.weights_sha256 is None else None,  # a spectrogram costs next to nothing
            )
            for name, e in contract.encoders.items()
        },
        system_tokens=len(chat_template.prefix) - 1,  # without the placeholder
        question_tokens=max(1, round(sum(sample.share * sample.question_tokens for sample in samples))),
        answer_tokens=max(1, round(sum(sample.share * sample.answer_tokens for sample in samples))),
    )


def _sample(
    features: FeatureSet, selected: NDArray[np.int64], chat_template: ChatTemplate, share: float
) -> _SampledQuestions:
    """Averages over selected questions at even distances; those that cannot be trained on are left out.

    Raises:
        UserError: none of them can be trained on.
    """
    table, rows, audio_s = features.table, [], []
    error: UserError | None = None
    for index in selected[np.linspace(0, len(selected) - 1, SAMPLED_QUESTIONS).astype(np.int64)]:
        clip = int(table.clip[index])
        question = features.clip(clip).questions[table.number[index]]
        try:
            rows.append(chat_template.row([question], audio=not features.is_text))
        except UserError as unfit:
            error = unfit
            continue
        clips = () if features.is_text else table.audio_of([index], clip)
        audio_s.append(float(table.duration_s[list(clips)].sum()))
    if not rows and error is not None:
        raise error
    prefix = len(chat_template.prefix) - features.is_text
    return _SampledQuestions(
        share=share,
        clip_s=float(np.mean(audio_s)),
        question_tokens=float(np.mean([len(row.input_ids) - prefix for row in rows])),
        answer_tokens=float(np.mean([(row.labels >= 0).sum() for row in rows])),
    )


def select_workload(workload: WorkloadConfig, data: DataConfig) -> WorkloadConfig:
    """Returns the part of a described workload that a config trains on: its tasks, and its mixture at its shares.

    A set of the mixture with a path of its own is taken to have the means of the whole workload.

    Raises:
        UserError: the config selects tasks or datasets that the workload does not describe.
    """
    parts = [(1 - sum(mixed.share for mixed in data.mixture), _select_part(workload, data, "data"))]
    for number, mixed in enumerate(data.mixture):
        chosen = workload if mixed.path is not None else _select_part(workload, mixed, f"data.mixture.{number}")
        parts.append((mixed.share, chosen))
    first_share, first = parts[0]
    return first.model_copy(
        update={
            "questions": round(first.questions / first_share),
            "question_tokens": round(sum(share * part.question_tokens for share, part in parts)),
            "answer_tokens": max(1, round(sum(share * part.answer_tokens for share, part in parts))),
        }
    )


def _select_part(workload: WorkloadConfig, data: DataConfig | MixtureConfig, key: str) -> WorkloadConfig:
    """Returns the workload of the selected tasks alone."""
    if data.datasets is not None:
        fault = "selects datasets, which a workload file does not describe"
        raise UserError(f"{key}.datasets", fault, "plan without --workload, or add data.datasets=null")
    if data.tasks is None:
        return workload
    requested, chosen = set(data.tasks), []
    for entry in workload.tasks:
        if requested.isdisjoint(entry.tasks):
            continue
        if not requested.issuperset(entry.tasks):
            fault = f"selects a part of {', '.join(entry.tasks)}, which the workload counts together"
            raise UserError(f"{key}.tasks", fault, "select all of them, or describe them one by one in the workload")
        chosen.append(entry)
        requested -= set(entry.tasks)
    if requested:
        known = sorted(task for entry in workload.tasks for task in entry.tasks)
        fault = f"'{min(requested)}' is not in the workload ({', '.join(known) or 'it describes no tasks'})"
        raise UserError(f"{key}.tasks", fault, "add it to `tasks` of the workload file, or plan without --workload")
    questions = sum(entry.questions for entry in chosen)

    def mean(values: Sequence[int]) -> int:
        return round(sum(v * entry.questions for v, entry in zip(values, chosen, strict=True)) / questions)

    return workload.model_copy(
        update={
            # Tasks may ask about the same clips: more than all there cannot be.
            "clips": min(workload.clips, sum(entry.clips for entry in chosen)),
            "questions": questions,
            "question_tokens": mean([entry.question_tokens or workload.question_tokens for entry in chosen]),
            "answer_tokens": mean([entry.answer_tokens or workload.answer_tokens for entry in chosen]),
        }
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
