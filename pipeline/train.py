"""`pal train CONFIG`: checks everything that is cheap to check, then runs the job under the `deepspeed` launcher.

The same module is the job itself: `deepspeed --module pipeline.train CONFIG` starts it on every rank."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint, launch, provenance, zero
from pipeline.config import ExperimentConfig, dump_config, load_config
from pipeline.distributed import Ranks, read_ranks
from pipeline.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError, run_command
from pipeline.features import FeatureContract, load_contract, require_encoders, require_same_features
from pipeline.streams import Stream

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.trainer import Trainer

_SAMPLED_ROWS = 256  # for the estimate of tokens per step


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
    if "RANK" in os.environ:
        return run_rank(config, read_ranks(), arguments.json)
    on_gpu, nproc = _devices(arguments.nproc)
    hosts = launch.read_hostfile(arguments.hostfile, arguments.nproc) if arguments.hostfile else {"localhost": nproc}
    world_size = sum(hosts.values())
    contract, streams = check(config, world_size, on_gpu=on_gpu)
    if arguments.dry_run:
        print(describe(config, contract, streams, world_size))
        return 0
    with checkpoint.lock(config.output):
        pass  # refuse here, in one line, before any process is started; rank 0 then holds it
    passed_on = [arguments.config, *arguments.overrides]
    started = time.time()
    per_node = arguments.nproc if arguments.hostfile else nproc
    for restart in range(arguments.max_restarts + 1):
        code, message = launch.supervise(
            passed_on, config.output, nproc=per_node, hostfile=arguments.hostfile, on_gpu=on_gpu
        )
        if code != EXIT_FAILURE or restart == arguments.max_restarts:
            break
        print(f"pal: {message}\npal: restart {restart + 1} of {arguments.max_restarts}", file=sys.stderr, flush=True)
    results = config.output / "train.json"
    if code == 0 and (not results.is_file() or results.stat().st_mtime < started):
        code, message = EXIT_FAILURE, f"the launcher ended without an error and without {results}"
    if code:
        _mark_failed(config, code)
        print(f"pal: {message}", file=sys.stderr)
    elif arguments.json:
        shutil.copyfile(results, arguments.json)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal train",
        description="Train one model with DeepSpeed. Started again with the same config, it goes on from its newest "
        f"checkpoint. Ended by a signal it saves first and exits with {EXIT_STOPPED}.",
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine (default: its GPUs, or 1)")
    parser.add_argument("--hostfile", type=Path, metavar="F", help="machines, one `HOST slots=N` a line")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after a failure go on from the newest checkpoint"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be trained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _devices(nproc: int | None) -> tuple[bool, int]:
    """Whether ranks run on GPUs, and how many there are on this machine."""
    import torch

    if nproc is not None and nproc < 1:
        raise UserError("--nproc", f"is {nproc}", "give 1 or more")
    gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    if gpus and nproc and nproc > gpus:
        raise UserError("--nproc", f"is {nproc}, this machine has {gpus} GPUs", "give at most that")
    return gpus > 0, nproc or gpus or 1


def check(config: ExperimentConfig, world_size: int, *, on_gpu: bool) -> tuple[FeatureContract, tuple[Stream, ...]]:
    """Everything that can be wrong with a job and is cheap to find out.

    Returns:
        the contract of the training set, and the streams with resolved layers.

    Raises:
        UserError: the first fault found.
    """
    accumulation = config.gradient_accumulation_steps(world_size)
    zero.render(config.train.zero, config.train, world_size=world_size, accumulation=accumulation, on_gpu=on_gpu)
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    if config.data.validation is not None:
        expected = {name: contract.encoders[name].fingerprint for name in config.model.encoders}
        require_same_features(expected, load_contract(config.data.validation), config.data.validation, "data.train")
    streams = config.model.resolve_streams(_language_model_config(config.model.language_model).num_hidden_layers)
    checkpoint.require_same_run(config.output, provenance.run_identity(config, contract.fingerprint))
    checkpoint.require_world_size(config.output, world_size)
    return contract, streams


def _language_model_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = f"'{name}' cannot be read ({str(error).splitlines()[0]})"
        raise UserError("model.language_model", fault, "give a Hugging Face folder or Hub name") from error


def describe(config: ExperimentConfig, contract: FeatureContract, streams: Sequence[Stream], world_size: int) -> str:
    """What `--dry-run` prints: the resolved tree, layers, parameters, tokens."""
    import numpy as np

    from pipeline import assembly
    from pipeline.data.shards import open_feature_set
    from pipeline.model import count_parameters

    _, chat = assembly.build_chat(config)
    parameters = count_parameters(assembly.build_empty_model(config, contract, chat.audio_token_id))
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    selected = features.table.select(config.data.tasks, config.data.datasets)
    clips = features.table.clip[selected[np.linspace(0, len(selected) - 1, _SAMPLED_ROWS).astype(np.int64)]]
    rows = [chat.row(features.clip(int(clip)).questions[: config.data.questions_per_sequence]) for clip in clips]
    sequences = config.train.global_batch_size // config.data.questions_per_sequence
    text_tokens = sequences * float(np.mean([len(row.input_ids) - 1 for row in rows]))
    seconds = sequences * float(np.mean(features.table.duration_s[clips]))
    frames = seconds * sum(contract.encoders[name].frame_rate_hz for name in config.model.encoders)
    lines = [dump_config(config).rstrip(), "---"]
    for stream in streams:
        where = (
            "in the sequence, all layers" if stream.integration == "plits" else f"layers {list(stream.audio_layers)}"
        )
        lines.append(f"{stream.integration} stream of {'+'.join(stream.encoders)}: {where}")
    lines += [
        f"parameters: {parameters['total']:,} in all, {parameters['trainable']:,} trained",
        f"a step: {config.train.global_batch_size} questions in {sequences} sequences on {world_size} ranks, "
        f"{config.gradient_accumulation_steps(world_size)} micro-batches each",
        f"tokens per step: about {text_tokens:,.0f} of text, {frames:,.0f} audio frames ({seconds:,.0f} s)",
    ]
    return "\n".join(lines)


def run_rank(config: ExperimentConfig, ranks: Ranks, results_file: Path | None) -> int:
    """The job on one rank. However it ends, the parent finds a record of why."""
    trainer: Trainer | None = None
    try:
        with ExitStack() as resources:
            if ranks.is_main:
                resources.enter_context(checkpoint.lock(config.output))
            launch.present(config.output, ranks.rank)
            check(config, ranks.world_size, on_gpu=zero.on_gpu())
            from pipeline.trainer import Stopped, Trainer

            zero.init_process_group(ranks, config.train.collective_timeout_s)
            trainer = Trainer(config, ranks, launch.say)
            launch.watch_parent(trainer.request_stop)
            try:
                results = trainer.fit()
            except Stopped as stopped:
                return launch.leave(config.output, ranks.rank, trainer.step, EXIT_STOPPED, str(stopped))
            if ranks.is_main and results_file is not None:
                results_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            trainer.engine.close()
            return 0
    except UserError as error:
        step = trainer.step if trainer else 0
        return launch.leave(config.output, ranks.rank, step, EXIT_USER_ERROR, str(error))
    except Exception as error:  # the last place where a rank can say what happened to it
        traceback.print_exc()
        step = trainer.step if trainer else 0
        message = f"{type(error).__name__}: {error}"
        lost_peer = zero.is_lost_peer(error)
        return launch.leave(config.output, ranks.rank, step, EXIT_FAILURE, message, lost_peer=lost_peer)


def _mark_failed(config: ExperimentConfig, code: int) -> None:
    """Tells MLflow of an end that rank 0 could not tell of itself."""
    run = checkpoint.read_run(config.output)
    if run is None or run.run_id is None or code in (EXIT_STOPPED, EXIT_USER_ERROR):
        return
    from pipeline import tracking

    try:
        tracking.end_run(config.tracking, config.output, run.run_id, "FAILED")
    except Exception as error:  # MLflow raises errors of many libraries; the message about the job matters more
        print(f"pal: MLflow does not answer ({type(error).__name__}): the run is not marked as failed", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
