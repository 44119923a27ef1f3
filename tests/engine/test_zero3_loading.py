"""Under ZeRO-3 a language model is partitioned while it is loaded: no rank ever holds all of it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.ranks import read_ranks
from pipeline.core.streams import Connector, Stream
from pipeline.engine import Engine, ParameterGroup, build_ds_config, init_process_group, partitioned_loading
from pipeline.model import PalConfig, PalForCausalLM, set_trainable
from tests.helpers.jobs import write_experiment
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_engine import settings


def load(language_model: Path, policy: str) -> tuple[int, int, dict[str, torch.Tensor] | None]:
    """Returns the elements of the language model on this rank before there is an engine: outside and inside partitions.

    Also returns all weights gathered by the engine.
    """
    train = settings(policy, 2)
    ds_config = build_ds_config(policy, train, world_size=2, accumulation=1, on_gpu=False)
    with partitioned_loading(ds_config):
        config = PalConfig(
            AutoConfig.from_pretrained(language_model),
            streams=(Stream(("log_mel",), "lal", Connector("mlp"), (0, 1)),),
            encoder_widths={"log_mel": 6},
            audio_token_id=1,
            base_language_model=str(language_model),
        )
        model = PalForCausalLM.from_language_model(config)
    whole = sum(parameter.numel() for parameter in model.language_model.parameters())
    partitioned = sum(parameter.ds_tensor.numel() for parameter in model.language_model.parameters() if whole == 0)
    set_trainable(model, "connector")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = Engine(model, [ParameterGroup("all", trained, 1e-3, 0.0)], ds_config)
    return whole, partitioned, engine.gathered_state()


def load_with_every_policy(language_model: Path) -> dict[str, tuple[int, int, dict[str, torch.Tensor] | None]]:
    init_process_group(read_ranks(), 120)
    return {policy: load(language_model, policy) for policy in ("zero2", "zero3")}


def test_no_rank_holds_a_language_model_whole(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    elements = sum(parameter.numel() for parameter in reference.parameters())
    main, other = run_on_ranks(load_with_every_policy, 2, tmp_path / "language_model")
    assert main["zero2"][:2] == other["zero2"][:2] == (elements, 0)
    for whole, partitioned, _ in (main["zero3"], other["zero3"]):
        assert whole == 0 and elements / 2 <= partitioned < elements / 2 * 1.01
    for policy, (_, _, state) in main.items():
        for name, tensor in reference.state_dict().items():
            assert torch.equal(state[f"language_model.{name}"], tensor), f"{policy} {name}"


def adapters_then_all(config: Path, folder: Path) -> None:
    """Trains a run with adapters, and one that starts from it with the adapters merged."""
    from pipeline.training.trainer import Trainer

    init_process_group(read_ranks(), 120)
    for policy in ("zero2", "zero3"):
        first, second = folder / f"{policy}-first", folder / f"{policy}-second"
        for settings_of_run in (
            [f"output={first}", "train.trainable=connector", "train.lora.rank=4"],
            [f"output={second}", f"starts_from={first}", "train.trainable=all"],
        ):
            experiment = load_config(
                ExperimentConfig, config, [*settings_of_run, f"train.zero={policy}", "train.steps=2"]
            )
            trainer = Trainer(experiment, read_ranks(), threading.Event())
            trainer.fit()
            trainer.engine.close()


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    run_on_ranks(adapters_then_all, 2, write_experiment(tmp_path, learning_rate=1e-3), tmp_path)
    for run in ("first", "second"):
        two, three = (
            load_file(tmp_path / f"{policy}-{run}" / "model" / "model.safetensors") for policy in ("zero2", "zero3")
        )
        assert two.keys() == three.keys()
        for name, tensor in two.items():
            assert (three[name] - tensor).abs().max() < 1e-4, f"{run} {name}"
    assert any("lora" in name for name in load_file(tmp_path / "zero3-first" / "model" / "model.safetensors"))
