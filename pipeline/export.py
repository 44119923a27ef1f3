"""`pal export CHECKPOINT OUT`: writes a training checkpoint as a Hugging Face folder, reads it back and compares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.arguments import add_json, write_results
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from pipeline.core.feature_contract import load_contract
from pipeline.training import checkpoint_dir, run_dir

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.model import PalForCausalLM


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    source = find_checkpoint(arguments.checkpoint)
    require_free(arguments.out)
    results = export(source, arguments.out)
    print(f"{arguments.out} holds {results['parameters']:,} parameters of {source}")
    write_results(results, arguments.json)
    return 0 if results["max_abs_difference"] == 0 else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal export", description="Write the weights of a checkpoint as a Hugging Face folder, and verify them."
    )
    parser.add_argument("checkpoint", type=Path, help="a step-* folder, or a run's output folder (its newest is taken)")
    parser.add_argument("out", type=Path, help="folder to write; replaces an earlier export")
    add_json(parser)
    return parser


def find_checkpoint(path: Path) -> Path:
    """Returns a checkpoint whose hashes are correct: the path itself, or the newest one of an output folder.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(path, "does not exist", "give a step-* folder or a run's output folder")
    if (path / checkpoint_dir.RECORD).is_file():
        checkpoint_dir.verify(path)
        return path
    from pipeline.training.build import newest_checkpoint

    return newest_checkpoint(path)


def require_free(out: Path) -> None:
    """Checks that writing to `out` overwrites nothing except an earlier export.

    Raises:
        UserError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    config = out / "config.json"
    if not config.is_file() or not (out / run_dir.CONFIG).is_file():
        raise UserError(out, "exists and is not an exported model", "choose another folder")


def export(source: Path, out: Path) -> dict[str, Any]:
    """Writes the model of a checkpoint to `out`, reads it back and compares every tensor.

    Returns:
        `parameters`, their number, and `max_abs_difference` between the weights written and those read back.
    """
    from pipeline.data.chat_template import build_chat_template
    from pipeline.model import count_parameters
    from pipeline.training.build import build_model, load_trained
    from pipeline.training.exported_model import load_model, save_model

    config = load_config(ExperimentConfig, source / run_dir.CONFIG)
    contract = load_contract(config.data.train)
    tokenizer, chat_template = build_chat_template(config.model.language_model, config.data, config.train.loss_on)
    model = build_model(config, contract, chat_template.audio_token_id)
    load_trained(model, source)
    save_model(model, tokenizer, config, out)
    difference = _largest_difference(model, load_model(out, config, model.dtype))
    return {"parameters": count_parameters(model)["total"], "max_abs_difference": difference}


def _largest_difference(written: PalForCausalLM, read: PalForCausalLM) -> float:
    tensors = read.state_dict()
    return max(float((p.float() - tensors[name].float()).abs().max()) for name, p in written.state_dict().items())


if __name__ == "__main__":
    sys.exit(run_command(main))
