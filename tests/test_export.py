"""An export holds the trained weights, according to our reader and to DeepSpeed's own, at every ZeRO stage."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ExperimentConfig, load_config
from pipeline.export import export, find_checkpoint
from pipeline.model import PalForCausalLM
from pipeline.training import checkpoint_dir
from tests.helpers.jobs import write_experiment
from tests.helpers.log_lines import log_lines
from tests.helpers.ranks import run_on_ranks

WAYS = [("zero1", "all"), ("zero2", "connector"), ("zero3", "connector"), ("zero3", "all")]


def train_every_way(config: Path, folder: Path) -> None:
    from pipeline.core.ranks import read_ranks
    from pipeline.engine import init_process_group
    from pipeline.training.trainer import Trainer

    ranks = read_ranks()
    init_process_group(ranks, 120)
    for policy, trainable in WAYS:
        output = f"output={folder / f'{policy}-{trainable}'}"
        settings = [output, f"train.zero={policy}", f"train.trainable={trainable}", "train.steps=2"]
        trainer = Trainer(load_config(ExperimentConfig, config, settings), ranks, threading.Event())
        trainer.fit()
        trainer.engine.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = write_experiment(folder)
    run_on_ranks(train_every_way, 2, config, folder)
    return folder


@pytest.mark.parametrize(("policy", "trainable"), WAYS)
def test_an_export_computes_what_the_trained_model_computes(
    trained: Path, tmp_path: Path, policy: str, trainable: str
) -> None:
    run = trained / f"{policy}-{trainable}"
    source = find_checkpoint(run)
    assert export(source, tmp_path / "model")["max_abs_difference"] == 0
    batch = {"input_ids": torch.arange(1, 13).view(2, 6)}
    with torch.no_grad():
        exported_logits, trained_logits = (
            PalForCausalLM.from_pretrained(folder).eval()(**batch).logits
            for folder in (tmp_path / "model", run / "model")
        )
    assert torch.equal(exported_logits, trained_logits)

    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(source), str(tmp_path / "deepspeed"), tag="engine")
    deepspeed_weights = torch.load(tmp_path / "deepspeed" / "pytorch_model.bin", weights_only=True)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert any(name.startswith("streams.") for name in deepspeed_weights)
    assert any(name.startswith("language_model.") for name in deepspeed_weights) == (trainable == "all")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in deepspeed_weights.items() if name in exported)
    assert len(deepspeed_weights.keys() - exported.keys()) <= 1  # the second name of a tied weight


def test_a_file_that_we_did_not_write_is_never_unpickled(trained: Path, tmp_path: Path) -> None:
    """A pickle executes code of its writer, so every hash is verified before anything is loaded."""
    import shutil

    from pipeline.core.errors import UserError

    source = Path(shutil.copytree(find_checkpoint(trained / "zero2-connector"), tmp_path / "step-000002"))
    victim = next((source / "engine").glob("*optim_states.pt"))
    victim.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="damaged"):
        find_checkpoint(source)
    with log_lines() as warnings:
        assert checkpoint_dir.newest_intact(tmp_path) is None
    assert len(warnings) == 1 and not (tmp_path / "ran").exists()
