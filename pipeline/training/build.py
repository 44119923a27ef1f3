"""Puts the parts of a run together, on every rank in the same way: data, model, DeepSpeed engine."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.config import ExperimentConfig, LoraConfig, TrainConfig, dump_config, load_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import FeatureContract, load_contract, write_encoders
from pipeline.core.ranks import Ranks
from pipeline.cost.flops import token_count
from pipeline.data.chat_template import ChatTemplate, build_chat_template
from pipeline.data.feature_set import FeatureSet, open_feature_set
from pipeline.data.loader import TrainingLoader
from pipeline.engine import (
    Engine,
    build_ds_config,
    gathered,
    limit_waiting,
    on_gpu,
    parameter_groups,
    partitioned_loading,
    trained_weights,
)
from pipeline.model import PalConfig, PalForCausalLM, add_lora, lora_parameters, merge_lora, set_trainable
from pipeline.training import checkpoint_dir, run_dir

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Components:
    """What a trainer works with.

    Attributes:
        audio_positions: see the function of this name.
        deepspeed_config: what the engine was built from.
        total_steps: None where tokens say how long the run is.
    """

    features: FeatureSet
    validation: FeatureSet | None
    model: PalForCausalLM
    tokenizer: PreTrainedTokenizerBase
    chat: ChatTemplate
    loader: TrainingLoader
    audio_positions: Callable[[float], int]
    engine: Engine
    deepspeed_config: dict[str, Any]
    total_steps: int | None


def build_components(config: ExperimentConfig, ranks: Ranks) -> Components:
    """Builds everything of one rank. The process group must exist.

    Raises:
        UserError: data, language model and config do not fit each other.
    """
    train = config.train
    encoders = config.model.encoders
    features = open_feature_set(config.data.train, encoders, config.data)
    validation = open_feature_set(config.data.validation, encoders, config.data) if config.data.validation else None
    tokenizer, chat = build_chat_template(config.model.language_model, config.data, train.loss_on)
    positions = audio_positions(config, features.contract)
    loader = build_loader(config, features, chat, ranks, positions)
    deepspeed_config = build_ds_config(
        train.zero,
        train,
        world_size=ranks.world_size,
        accumulation=config.gradient_accumulation_steps(ranks.world_size),
        on_gpu=on_gpu(),
    )
    torch.manual_seed(train.seed)
    with partitioned_loading(deepspeed_config):
        model = build_model(config, features.contract, chat.audio_token_id)
    engine = Engine(model, parameter_groups(model, train), deepspeed_config)
    limit_waiting(train.collective_timeout_s)
    steps = total_steps(train, loader)
    return Components(features, validation, model, tokenizer, chat, loader, positions, engine, deepspeed_config, steps)


def audio_positions(config: ExperimentConfig, contract: FeatureContract) -> Callable[[float], int]:
    """Seconds of a clip -> positions that its audio takes in the sequence, from the encoders' frame rates."""
    num_layers = AutoConfig.from_pretrained(config.model.language_model).num_hidden_layers
    streams = [s for s in config.model.resolve_streams(num_layers) if s.integration == "plits"]
    rates = [contract.encoders[stream.encoders[0]].frame_rate_hz for stream in streams]

    def positions(seconds: float) -> int:
        frames = [math.ceil(seconds * rate) for rate in rates]
        return sum(token_count(stream.connector, n) for stream, n in zip(streams, frames, strict=True))

    return positions


def build_loader(
    config: ExperimentConfig, features: FeatureSet, chat: ChatTemplate, ranks: Ranks, positions: Callable[[float], int]
) -> TrainingLoader:
    """The training batches of one rank; `positions` are from `audio_positions`."""
    return TrainingLoader(features, chat, config.data, config.train, ranks, positions)


def total_steps(train: TrainConfig, loader: TrainingLoader) -> int | None:
    """Optimizer steps of the whole run; None where tokens say how long it is."""
    return train.steps or (math.ceil(train.epochs * loader.steps_per_epoch) if train.epochs else None)


def build_model(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> PalForCausalLM:
    """The language model with its weights and fresh streams, or what the runs before this one made of them, adapted
    and frozen as `train` says.

    Raises:
        UserError: the run that it starts from has no good checkpoint.
    """
    model = PalForCausalLM.from_language_model(
        config.model.language_model,
        **_model_settings(config, contract, audio_token_id),
        dtype=DTYPES[config.train.precision],
    )
    if config.starts_from is not None:
        _take_over(model, config.starts_from)
    choose_trained(model, config.train)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile_feed_forward()
    return model


def build_empty_model(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> PalForCausalLM:
    """The same model without weights (on torch's meta device), for counting."""
    language_model = AutoConfig.from_pretrained(config.model.language_model)
    with torch.device("meta"):
        model = PalForCausalLM(PalConfig(language_model, **_model_settings(config, contract, audio_token_id)))
        choose_trained(model, config.train)
    return model


def choose_trained(model: PalForCausalLM, train: TrainConfig) -> None:
    _adapt(model, train.lora)
    set_trainable(model, train.trainable)


def _adapt(model: PalForCausalLM, lora: LoraConfig | None) -> None:
    """Gives the model these adapters. Equal ones of a run before are trained on, others become part of the weights."""
    wanted = None if lora is None else lora.model_dump()
    if model.config.lora not in (None, wanted):
        with gathered(lora_parameters(model)):
            merge_lora(model)
    if wanted is not None and model.config.lora is None:
        add_lora(model, **wanted)


def _take_over(model: PalForCausalLM, origin: Path) -> None:
    """Gives the model what a finished run trained, on top of what that run took over itself."""
    before = load_config(ExperimentConfig, origin / run_dir.CONFIG)
    if before.starts_from is not None:
        _take_over(model, before.starts_from)
    choose_trained(model, before.train)
    load_trained(model, newest_checkpoint(origin))


def newest_checkpoint(output: Path) -> Path:
    """The newest good checkpoint of an output folder.

    Raises:
        UserError: there is none.
    """
    found = checkpoint_dir.newest_good(output, lambda warning: print(f"pal: {warning}", file=sys.stderr))
    if found is None:
        raise UserError(output, "holds no complete checkpoint", "give a step-* folder or a run's output folder")
    return found[0]


def load_trained(model: PalForCausalLM, source: Path) -> None:
    """Gives the model every weight that is trained, from a checkpoint.

    Raises:
        UserError: the checkpoint lacks some.
    """
    trained = trained_weights(source)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted - trained.keys():
        missing = min(wanted - trained.keys())
        raise UserError(source, f"lacks trained weights ({missing} and others)", "use the config it was written by")
    for name, parameter in model.named_parameters():
        if name in wanted:
            with torch.no_grad(), gathered([parameter]):
                parameter.copy_(trained[name])


def save_model(
    model: PalForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: ExperimentConfig,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the Hugging Face folder that `pal evaluate` reads: weights, tokenizer, and the config it was trained by.

    Args:
        state_dict: the weights where the model does not hold them itself (ZeRO-3).
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    (temporary / run_dir.CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_encoders(temporary, load_contract(config.data.train), config.model.encoders)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _model_settings(config: ExperimentConfig, contract: FeatureContract, audio_token_id: int) -> dict[str, Any]:
    num_layers = AutoConfig.from_pretrained(config.model.language_model).num_hidden_layers
    encoders = {name: contract.encoders[name] for name in config.model.encoders}
    return {
        "streams": config.model.resolve_streams(num_layers),
        "encoder_widths": {name: encoder.width for name, encoder in encoders.items()},
        "audio_token_id": audio_token_id,
        "encoder_grids": {name: encoder.grid for name, encoder in encoders.items() if encoder.grid},
        "norm_audio_tokens": config.model.norm_audio_tokens,
        "system_text_sees_audio": config.model.system_text_sees_audio,
        "audio_queries": config.model.audio_queries,
        "feature_fingerprints": {name: encoder.fingerprint for name, encoder in encoders.items()},
    }


def validation_questions(features: FeatureSet, config: ExperimentConfig) -> np.ndarray:
    """Indices of the questions that the validation loss is taken on, spread evenly over the set."""
    everything = features.table.select(config.data.tasks, config.data.datasets)
    count = min(len(everything), config.data.validation_questions)
    return everything[np.linspace(0, len(everything) - 1, count).astype(np.int64)]
