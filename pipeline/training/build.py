"""Builds the components of a run, in the same way on every rank: data, model, DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.config import ExperimentConfig, LoraConfig, TrainConfig, load_config
from pipeline.core.console import logger
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import FeatureContract, load_contract
from pipeline.core.ranks import Ranks
from pipeline.core.streams import IntegrationKind, Stream
from pipeline.cost.flops import whole_time_steps
from pipeline.data.chat_template import ChatTemplate, build_chat_template
from pipeline.data.feature_set import FeatureSet, open_mixture
from pipeline.data.loader import TrainingLoader
from pipeline.data.template_parts import describe_system_text
from pipeline.engine import (
    Engine,
    build_ds_config,
    gathered,
    on_gpu,
    parameter_groups,
    partitioned_loading,
    set_group_timeouts,
    trained_weights,
)
from pipeline.model import PalConfig, PalForCausalLM, add_lora, lora_parameters, merge_lora, set_trainable
from pipeline.model.connectors import count_audio_tokens
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.checked_sets import CheckedSets, open_checked_sets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Components:
    """The parts of a run on one rank.

    Attributes:
        sets: feature sets, whose questions are checked.
        audio_positions: duration of a clip in seconds -> positions of its audio in the sequence, approximately.
        ds_config: DeepSpeed config of the engine.
        total_steps: optimizer steps of the run; None if its length is set in tokens.
    """

    sets: CheckedSets
    model: PalForCausalLM
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate
    loader: TrainingLoader
    audio_positions: Callable[[float], int]
    engine: Engine
    ds_config: dict[str, Any]
    total_steps: int | None

    @property
    def features(self) -> FeatureSet:
        """Training set."""
        return self.sets.train

    @property
    def validation(self) -> FeatureSet | None:
        """Held-out set, if the config names one."""
        return self.sets.validation


def build_components(config: ExperimentConfig, ranks: Ranks) -> Components:
    """Builds the components of one rank. The process group must exist.

    Raises:
        UserError: data, language model and config do not match.
    """
    train = config.train
    tokenizer, chat_template = build_chat_template(config.model.language_model, config.data, train.loss_on)
    sets = check_questions(config, chat_template)
    if ranks.is_main:
        if note := describe_system_text(tokenizer, config.data.system_prompt):
            logger.info(note)
        sets.report(config.output)
        sets.write_list(config.output)
    positions = audio_positions(config, sets.train.contract)
    loader = TrainingLoader([sets.train, *sets.mixture], chat_template, config.data, train, ranks, positions)
    ds_config = build_ds_config(
        train.zero,
        train,
        world_size=ranks.world_size,
        accumulation=config.gradient_accumulation_steps(ranks.world_size),
        on_gpu=on_gpu(),
    )
    torch.manual_seed(train.seed)
    with partitioned_loading(ds_config):
        model = build_model(config, sets.train.contract, chat_template.audio_token_id)
    engine = Engine(model, parameter_groups(model, train), ds_config)
    set_group_timeouts(train.collective_timeout_s)
    steps = total_steps(train, loader)
    return Components(sets, model, tokenizer, chat_template, loader, positions, engine, ds_config, steps)


def check_questions(config: ExperimentConfig, chat_template: ChatTemplate) -> CheckedSets:
    """Opens the feature sets of a run and checks their questions; see `open_checked_sets`."""
    contract = load_contract(config.data.train)
    return open_checked_sets(config, chat_template, audio_positions(config, contract, ("plits", "lal")))


def audio_positions(
    config: ExperimentConfig, contract: FeatureContract, integrations: tuple[IntegrationKind, ...] = ("plits",)
) -> Callable[[float], int]:
    """Returns a function that estimates how many positions of the sequence the audio of a clip takes.

    Its argument is the clip's duration in seconds. Frames follow from the encoders' frame rates, tokens from the rule
    of the connectors themselves.

    Args:
        integrations: whose audio tokens count. Those of `lal` take positions too, but no entries of the sequence.
    """
    num_layers = AutoConfig.from_pretrained(config.model.language_model).num_hidden_layers
    streams = [s for s in config.model.resolve_streams(num_layers) if s.integration in integrations]

    def stream_tokens(stream: Stream, seconds: float) -> int:
        encoders = [contract.encoders[name] for name in stream.encoders]
        frames = [whole_time_steps(math.ceil(seconds * e.frame_rate_hz), e.grid) for e in encoders]
        return count_audio_tokens(stream.connector, [e.grid for e in encoders], frames)

    return lambda seconds: sum(stream_tokens(stream, seconds) for stream in streams)


def build_loader(
    config: ExperimentConfig,
    features: FeatureSet,
    chat_template: ChatTemplate,
    ranks: Ranks,
    positions: Callable[[float], int],
) -> TrainingLoader:
    """Builds the loader of one rank's training batches; `positions` is from `audio_positions`."""
    sets = [features, *open_mixture(features, config.data)]
    return TrainingLoader(sets, chat_template, config.data, config.train, ranks, positions)


def total_steps(train: TrainConfig, loader: TrainingLoader) -> int | None:
    """Returns the optimizer steps of the whole run; None if its length is set in tokens."""
    return train.steps or (math.ceil(train.epochs * loader.steps_per_epoch) if train.epochs else None)


def build_model(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> PalForCausalLM:
    """Builds the model of a run: adapted and frozen according to `train`.

    Its weights are the pretrained language model and newly initialized streams, or those that the run of
    `starts_from` ended with.

    Raises:
        UserError: the run that it starts from has no intact checkpoint.
    """
    model = PalForCausalLM.from_language_model(
        _pal_config(config, contract, audio_token_id), DTYPES[config.train.precision]
    )
    if config.starts_from is not None:
        _load_run(model, config.starts_from)
    choose_trained(model, config.train)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile_feed_forward()
    return model


def build_empty_model(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> PalForCausalLM:
    """Builds the same model without weights (on torch's meta device), for counting parameters."""
    with torch.device("meta"):
        model = PalForCausalLM(_pal_config(config, contract, audio_token_id))
        choose_trained(model, config.train)
    return model


def choose_trained(model: PalForCausalLM, train: TrainConfig) -> None:
    """Adds adapters and freezes parameters as `train` requires."""
    _adapt(model, train.lora)
    set_trainable(model, train.trainable)


def _adapt(model: PalForCausalLM, lora: LoraConfig | None) -> None:
    """Adds LoRA adapters. Equal ones of an earlier run stay and are trained further, others are merged first."""
    requested = None if lora is None else lora.model_dump()
    if model.config.lora not in (None, requested):
        with gathered(lora_parameters(model)):
            merge_lora(model)
    if requested is not None and model.config.lora is None:
        add_lora(model, **requested)


def _load_run(model: PalForCausalLM, output: Path) -> None:
    """Loads the weights that a finished run trained, after those of the run which that one started from."""
    config = load_config(ExperimentConfig, output / run_dir.CONFIG)
    if config.starts_from is not None:
        _load_run(model, config.starts_from)
    choose_trained(model, config.train)
    load_trained(model, newest_checkpoint(output))


def newest_checkpoint(output: Path) -> Path:
    """Returns the newest intact checkpoint of an output folder.

    Raises:
        UserError: there is none.
    """
    newest = checkpoint_dir.newest_intact(output)
    if newest is None:
        raise UserError(output, "holds no complete checkpoint", "give a step-* folder or a run's output folder")
    return newest[0]


def load_trained(model: PalForCausalLM, source: Path) -> None:
    """Loads every trainable weight from a checkpoint.

    Raises:
        UserError: the checkpoint lacks some.
    """
    weights = trained_weights(source)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := trainable - weights.keys():
        fault = f"lacks {len(missing)} trained weights, {min(missing)} for one"
        raise UserError(source, fault, "use the config that it was written with")
    for name, parameter in model.named_parameters():
        if name in trainable:
            with torch.no_grad(), gathered([parameter]):
                parameter.copy_(weights[name])


def _pal_config(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> PalConfig:
    name = config.model.language_model
    language_model = AutoConfig.from_pretrained(name)
    encoders = {name: contract.encoders[name] for name in config.model.encoders}
    return PalConfig(
        language_model,
        streams=config.model.resolve_streams(language_model.num_hidden_layers),
        encoder_widths={name: encoder.width for name, encoder in encoders.items()},
        audio_token_id=audio_token_id,
        encoder_grids={name: encoder.grid for name, encoder in encoders.items() if encoder.grid},
        norm_audio_tokens=config.model.norm_audio_tokens,
        system_text_sees_audio=config.model.system_text_sees_audio,
        audio_queries=config.model.audio_queries,
        feature_fingerprints={name: encoder.fingerprint for name, encoder in encoders.items()},
        base_language_model=str(name),
    )
