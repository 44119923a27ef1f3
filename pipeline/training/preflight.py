"""Cheap checks of a run before it starts, and the text of a dry run."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.config import ExperimentConfig, load_config
from pipeline.config.flat import flatten
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import (
    FeatureContract,
    load_contract,
    require_encoders,
    require_same_features,
    require_text,
)
from pipeline.core.ranks import Ranks
from pipeline.core.streams import Stream
from pipeline.engine import build_ds_config
from pipeline.training import checkpoint_dir, run_dir

_SAMPLED_ROWS = 256  # for the estimate of tokens per step


def check(
    config: ExperimentConfig,
    world_size: int,
    *,
    on_gpu: bool,
    reshard: bool = False,
    planned: Collection[Path] = (),
) -> tuple[FeatureContract, tuple[Stream, ...]]:
    """Checks everything that can be checked without starting a process.

    Args:
        reshard: whether a checkpoint of another number of ranks may be converted.
        planned: output folders of runs that will have finished when this one begins.

    Returns:
        the feature contract of the training set, and the streams with resolved layers.

    Raises:
        UserError: the first fault found.
    """
    accumulation = config.gradient_accumulation_steps(world_size)
    build_ds_config(config.train.zero, config.train, world_size=world_size, accumulation=accumulation, on_gpu=on_gpu)
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    if config.model.text_only:
        sets = [config.data.train, config.data.validation, *(mixed.path for mixed in config.data.mixture)]
        for location in filter(None, sets):
            require_text(load_contract(location), location)
    if config.data.validation is not None:
        expected = {name: contract.encoders[name].fingerprint for name in config.model.encoders}
        require_same_features(expected, load_contract(config.data.validation), config.data.validation, "data.train")
    from pipeline.model.language_models import language_model_config

    streams = config.model.resolve_streams(language_model_config(config.model.language_model).num_hidden_layers)
    origin = _check_origin(config, planned)
    run_dir.require_same_run(config.output, run_dir.run_identity(config, contract.fingerprint, origin))
    checkpoint_dir.require_resumable(config.output, world_size, reshard=reshard)
    return contract, streams


def _check_origin(config: ExperimentConfig, planned: Collection[Path]) -> str | None:
    """Returns the identity of the run that this one starts from."""
    folder = config.starts_from
    if folder is None:
        return None
    if folder not in planned and not run_dir.is_finished(folder):
        raise UserError(config.output, f"starts from {folder}, which is not finished", "run that first")
    if run_dir.is_finished(folder):
        origin_model = load_config(ExperimentConfig, folder / run_dir.CONFIG).model
        if origin_model.text_only and not config.model.text_only:
            remedy = f"set model.language_model to {folder / 'model'} instead"
            raise UserError("starts_from", f"{folder} trained a language model on text alone", remedy)
        settings, origin_settings = (flatten(m.model_dump(mode="json")) for m in (config.model, origin_model))
        for key in settings.keys() | origin_settings.keys():
            value, origin_value = settings.get(key), origin_settings.get(key)
            if value != origin_value:
                fault = f"{folder} was trained with model.{key} = {origin_value!r}, this config has {value!r}"
                raise UserError("starts_from", fault, "start from a run of the same model")
    return run_dir.identity_of(folder)


def describe(config: ExperimentConfig, contract: FeatureContract, streams: Sequence[Stream], world_size: int) -> str:
    """Returns the text of `--dry-run`: layers, parameters, selected questions, steps, tokens."""
    import numpy as np

    from pipeline.data.chat_template import build_chat_template
    from pipeline.data.loader import TrainingLoader
    from pipeline.data.template_parts import describe_system_text
    from pipeline.model import count_parameters
    from pipeline.training.build import audio_positions, build_empty_model, check_questions, total_steps

    tokenizer, chat_template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    parameters = count_parameters(build_empty_model(config, contract, chat_template.audio_token_id))
    sets = check_questions(config, chat_template)
    sets.report()
    positions, ranks = audio_positions(config, contract), Ranks(0, world_size, 0, 1)
    loader = TrainingLoader([sets.train, *sets.mixture], chat_template, config.data, config.train, ranks, positions)
    table = sets.train.table
    selected = table.select(config.data.tasks, config.data.datasets)
    clip_of_selected = table.clip[selected]
    clips = clip_of_selected[np.linspace(0, len(selected) - 1, _SAMPLED_ROWS).astype(np.int64)]
    first, last = (np.searchsorted(clip_of_selected, clips, side) for side in ("left", "right"))
    last = np.minimum(last, first + config.data.questions_per_sequence)
    counts = np.zeros(len(table), np.int64) if table.tokens is None else table.tokens
    row_tokens = [counts[selected[begin:end]].sum() for begin, end in zip(first, last, strict=True)]
    sequences = config.train.global_batch_size // config.data.questions_per_sequence
    text_tokens = sequences * float(len(chat_template.prefix) - 1 + np.mean(row_tokens))
    seconds = 0.0 if sets.train.is_text else sequences * float(np.mean(table.duration_s[clips]))
    steps = total_steps(config.train, loader) or math.ceil((config.train.tokens or 0) / text_tokens)
    frames = seconds * sum(contract.encoders[name].frame_rate_hz for name in config.model.encoders)
    note = describe_system_text(tokenizer, config.data.system_prompt)
    lines = [note] if note else []
    for stream in streams:
        location = (
            "in the sequence, all layers" if stream.integration == "plits" else f"layers {list(stream.audio_layers)}"
        )
        lines.append(f"{stream.integration} stream of {'+'.join(stream.encoders)}: {location}")
    lines += [
        f"parameters: {parameters['total']:,} in all, {parameters['trainable']:,} trained",
        f"{'about ' if config.train.tokens else ''}{steps:,} steps on {len(selected):,} questions about "
        f"{len(np.unique(clip_of_selected)):,} clips",
        f"a step: {config.train.global_batch_size} questions in {sequences} sequences on {world_size} ranks, "
        f"{config.gradient_accumulation_steps(world_size)} micro-batches each"
        f"{' or more' if config.train.micro_batch_tokens else ''}",
        f"tokens per step: about {text_tokens:,.0f} of text, {frames:,.0f} audio frames ({seconds:,.0f} s)",
    ]
    return "\n".join(lines)
