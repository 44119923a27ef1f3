"""The folder of a trained model, in the Hugging Face format: how it is written and read.

A model with streams is saved as `PalForCausalLM`. One trained on text alone is saved as the plain language model that
it is, so that a later run can begin from it (`model.language_model`), and any other software can read it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.config import ExperimentConfig, dump_config, load_config, validate_config
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import load_contract, write_encoders
from pipeline.data.chat_template import load_tokenizer
from pipeline.data.template_parts import AUDIO_TOKEN
from pipeline.model import PalConfig, PalForCausalLM
from pipeline.training import run_dir

_LANGUAGE_MODEL = "language_model."  # prefix of its parameters in a PalForCausalLM


def save_model(
    model: PalForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: ExperimentConfig,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the Hugging Face folder that `pal evaluate` reads: weights, tokenizer and the config of the training run.

    Args:
        folder: is replaced if it exists.
        state_dict: the weights, if the model itself does not hold them (ZeRO-3).
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if config.model.text_only:
        _save_language_model(model, config.model.language_model, temporary, state_dict)
    else:
        model.save_pretrained(temporary, state_dict=state_dict)
        tokenizer.save_pretrained(temporary)
    (temporary / run_dir.CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_encoders(temporary, load_contract(config.data.train), config.model.encoders)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _save_language_model(
    model: PalForCausalLM, origin: str, folder: Path, state_dict: dict[str, torch.Tensor] | None
) -> None:
    """Saves the language model with the tokenizer of `origin`, which lacks the placeholder of audio."""
    if state_dict is not None:
        state_dict = {name.removeprefix(_LANGUAGE_MODEL): tensor for name, tensor in state_dict.items()}
    model.language_model.save_pretrained(folder, state_dict=state_dict)
    AutoTokenizer.from_pretrained(origin, trust_remote_code=False).save_pretrained(folder)


def read_training_config(folder: Path) -> ExperimentConfig:
    """Reads the config that a saved model was trained with.

    A plain language model, which no run of ours trained, gets one for answering sets of text; its prompts have the
    template's own system text where a question has none.

    Raises:
        UserError: the folder is neither.
    """
    if (folder / run_dir.CONFIG).is_file():
        return load_config(ExperimentConfig, folder / run_dir.CONFIG)
    if not (folder / "config.json").is_file():
        fault = "is not an exported model" if folder.is_dir() else "does not exist"
        raise UserError(folder, fault, "give the folder `model` of a run, or one made by `pal export`")
    values = {
        "output": str(folder),
        "model": {"language_model": str(folder), "encoders": [], "integration": "none"},
        "data": {"train": str(folder), "system_prompt": None},
        "train": {"steps": 1},
    }
    return validate_config(ExperimentConfig, values, str(folder))


def read_model_config(folder: Path, config: ExperimentConfig) -> PalConfig:
    """Reads the config of a saved model; reads no weights.

    Args:
        config: config of the run that trained the model.
    """
    if not config.model.text_only:
        return PalConfig.from_pretrained(folder)
    audio_token_id: int = load_tokenizer(folder).convert_tokens_to_ids(AUDIO_TOKEN)
    language_model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return PalConfig(language_model, audio_token_id=audio_token_id, base_language_model=str(folder))


def load_model(folder: Path, config: ExperimentConfig, dtype: torch.dtype | Literal["auto"] = "auto") -> PalForCausalLM:
    """Loads a saved model.

    Args:
        config: config of the run that trained the model.
    """
    if config.model.text_only:
        return PalForCausalLM.from_language_model(read_model_config(folder, config), dtype)
    # An empty generation config: transformers would read the folder's and warn of settings that are not used anyway.
    return PalForCausalLM.from_pretrained(folder, dtype=dtype, generation_config=GenerationConfig())
