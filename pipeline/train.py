"""`pal train CONFIG`: checks everything that is cheap to check, then runs the job under the `deepspeed` launcher, or on
the nodes of a Ray cluster.

The same module is the job itself: `deepspeed --module pipeline.train CONFIG` starts it on every rank."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ExperimentConfig, choose_stages, dump_config, load_config
from pipeline.core import provenance
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError, run_command
from pipeline.core.feature_contract import FeatureContract, load_contract, require_encoders, require_same_features
from pipeline.core.ranks import Ranks, read_ranks
from pipeline.core.streams import Stream
from pipeline.engine import (
    from_main_rank,
    init_process_group,
    is_lost_peer,
    leave_process_group,
    on_gpu,
    render,
    require_same_everywhere,
)
from pipeline.launch import supervisor
from pipeline.training import checkpoint_dir

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.training.trainer import Trainer

_SAMPLED_ROWS = 256  # for the estimate of tokens per step


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
    stages = choose_stages(config, arguments.stage)
    if "RANK" in os.environ:
        return run_rank(config, stages, read_ranks(), arguments.json, reshard=arguments.reshard)
    on_gpu, nproc = _devices(arguments.ray, arguments.nproc)
    hosts = (
        supervisor.read_hostfile(arguments.hostfile, arguments.nproc) if arguments.hostfile else {"localhost": nproc}
    )
    world_size = sum(hosts.values())
    outputs = [stage.output for stage in stages.values()]
    checked = [
        check(stage, world_size, on_gpu=on_gpu, reshard=arguments.reshard, planned=outputs[:number])
        for number, stage in enumerate(stages.values())
    ]
    if arguments.dry_run:
        print(dump_config(config).rstrip(), "---", sep="\n")
        for (name, stage), (contract, streams) in zip(stages.items(), checked, strict=True):
            if name:
                print(f"stage {name}, in {stage.output}")
            print(describe(stage, contract, streams, world_size))
        return 0
    with checkpoint_dir.lock(config.output):
        pass  # refuse here, in one line, before any process is started; rank 0 then holds it
    passed_on = [arguments.config, *arguments.overrides, *(["--reshard"] if arguments.reshard else [])]
    passed_on += [f"--stage={arguments.stage}"] if arguments.stage else []
    started = time.time()
    per_node = arguments.nproc if arguments.hostfile else nproc
    for restart in range(arguments.max_restarts + 1):
        code, message = supervisor.supervise(
            passed_on,
            config.output,
            nproc=per_node,
            hostfile=arguments.hostfile,
            on_gpu=on_gpu,
            ray_address=arguments.ray,
        )
        if code != EXIT_FAILURE or restart == arguments.max_restarts:
            break
        print(f"pal: {message}\npal: restart {restart + 1} of {arguments.max_restarts}", file=sys.stderr, flush=True)
    results = outputs[-1] / checkpoint_dir.RESULTS
    if code == 0 and (not results.is_file() or results.stat().st_mtime < started):
        code, message = EXIT_FAILURE, f"the launcher ended without an error and without {results}"
    if code:
        _mark_failed(stages, code)
        print(f"pal: {message}", file=sys.stderr)
    elif arguments.json:
        _write_figures(stages, arguments.json)
    return code


def _devices(ray_address: str | None, nproc: int | None) -> tuple[bool, int]:
    if ray_address is None:
        return supervisor.devices(nproc)
    from pipeline.launch import ray_launcher  # imports ray, which takes seconds

    return ray_launcher.devices(ray_address, nproc)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal train",
        description="Train one model with DeepSpeed. Started again with the same config, it goes on from its newest "
        f"checkpoint. Ended by a signal it saves first and exits with {EXIT_STOPPED}.",
    )
    parser.add_argument("config", help="a YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks on this machine, or on the Ray cluster (default: its GPUs, or 1)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="F", help="machines, one `HOST slots=N` a line")
    where.add_argument("--ray", metavar="ADDRESS", help="place the ranks on the nodes of this Ray cluster (auto)")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after a failure go on from the newest checkpoint"
    )
    parser.add_argument(
        "--reshard", action="store_true", help="go on also from a checkpoint that another number of ranks wrote"
    )
    parser.add_argument("--stage", metavar="NAME", help="run this stage of the config alone (default: all, in order)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be trained")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def check(
    config: ExperimentConfig,
    world_size: int,
    *,
    on_gpu: bool,
    reshard: bool = False,
    planned: Collection[Path] = (),
) -> tuple[FeatureContract, tuple[Stream, ...]]:
    """Everything that can be wrong with a run and is cheap to find out.

    Args:
        planned: output folders of runs that will have finished when this one begins.

    Returns:
        the contract of the training set, and the streams with resolved layers.

    Raises:
        UserError: the first fault found.
    """
    accumulation = config.gradient_accumulation_steps(world_size)
    render(config.train.zero, config.train, world_size=world_size, accumulation=accumulation, on_gpu=on_gpu)
    contract = load_contract(config.data.train)
    require_encoders(contract, config.model.encoders, config.data.train)
    if config.data.validation is not None:
        expected = {name: contract.encoders[name].fingerprint for name in config.model.encoders}
        require_same_features(expected, load_contract(config.data.validation), config.data.validation, "data.train")
    from pipeline.model.language_models import language_model_config

    streams = config.model.resolve_streams(language_model_config(config.model.language_model).num_hidden_layers)
    origin = _check_origin(config, planned)
    checkpoint_dir.require_same_run(config.output, provenance.run_identity(config, contract.fingerprint, origin))
    if not reshard:
        checkpoint_dir.require_world_size(config.output, world_size)
    return contract, streams


def _check_origin(config: ExperimentConfig, planned: Collection[Path]) -> str | None:
    """The identity of the run that this one starts from."""
    folder = config.starts_from
    if folder is None:
        return None
    if folder not in planned and not checkpoint_dir.is_finished(folder):
        raise UserError(config.output, f"starts from {folder}, which is not finished", "run that first")
    if checkpoint_dir.is_finished(folder):
        model = load_config(ExperimentConfig, folder / checkpoint_dir.CONFIG).model
        here, there = (provenance.flatten(m.model_dump(mode="json")) for m in (config.model, model))
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                fault = f"{folder} was trained with model.{key} = {there.get(key)!r}, here it is {here.get(key)!r}"
                raise UserError("starts_from", fault, "start from a run of the same model")
    return checkpoint_dir.identity_of(folder)


def describe(config: ExperimentConfig, contract: FeatureContract, streams: Sequence[Stream], world_size: int) -> str:
    """What `--dry-run` prints of a run: layers, parameters, what is selected, steps, tokens."""
    import numpy as np

    from pipeline.data.feature_set import open_feature_set
    from pipeline.model import count_parameters
    from pipeline.training.build import audio_positions, build_chat, build_empty_model, build_loader, total_steps

    _, chat = build_chat(config)
    parameters = count_parameters(build_empty_model(config, contract, chat.audio_token_id))
    features = open_feature_set(config.data.train, config.model.encoders, config.data)
    positions = audio_positions(config, contract)
    loader = build_loader(config, features, chat, Ranks(0, world_size, 0, 1), positions)
    selected = features.table.select(config.data.tasks, config.data.datasets)
    clips = features.table.clip[selected[np.linspace(0, len(selected) - 1, _SAMPLED_ROWS).astype(np.int64)]]
    rows = [chat.row(features.clip(int(clip)).questions[: config.data.questions_per_sequence]) for clip in clips]
    sequences = config.train.global_batch_size // config.data.questions_per_sequence
    text_tokens = sequences * float(np.mean([len(row.input_ids) - 1 for row in rows]))
    seconds = sequences * float(np.mean(features.table.duration_s[clips]))
    steps = total_steps(config.train, loader) or math.ceil((config.train.tokens or 0) / text_tokens)
    frames = seconds * sum(contract.encoders[name].frame_rate_hz for name in config.model.encoders)
    lines = []
    for stream in streams:
        where = (
            "in the sequence, all layers" if stream.integration == "plits" else f"layers {list(stream.audio_layers)}"
        )
        lines.append(f"{stream.integration} stream of {'+'.join(stream.encoders)}: {where}")
    lines += [
        f"parameters: {parameters['total']:,} in all, {parameters['trainable']:,} trained",
        f"{'about ' if config.train.tokens else ''}{steps:,} steps on {len(selected):,} questions about "
        f"{len(np.unique(features.table.clip[selected])):,} clips",
        f"a step: {config.train.global_batch_size} questions in {sequences} sequences on {world_size} ranks, "
        f"{config.gradient_accumulation_steps(world_size)} micro-batches each"
        f"{' or more' if config.train.micro_batch_tokens else ''}",
        f"tokens per step: about {text_tokens:,.0f} of text, {frames:,.0f} audio frames ({seconds:,.0f} s)",
    ]
    return "\n".join(lines)


def run_rank(
    config: ExperimentConfig,
    stages: Mapping[str, ExperimentConfig],
    ranks: Ranks,
    results_file: Path | None,
    *,
    reshard: bool,
) -> int:
    """The job on one rank: every stage that is not finished, in order. However it ends, the parent finds why."""
    trainer: Trainer | None = None
    stop = threading.Event()
    try:
        with ExitStack() as resources:
            if ranks.is_main:
                for folder in dict.fromkeys([config.output, *(stage.output for stage in stages.values())]):
                    resources.enter_context(checkpoint_dir.lock(folder))
                supervisor.forget_ranks(config.output, ranks.world_size)
            supervisor.present(config.output, ranks.rank)
            from pipeline.training.trainer import Stopped, Trainer

            init_process_group(ranks, config.train.collective_timeout_s)
            settings = provenance.flatten(config.model_dump(mode="json"))
            require_same_everywhere({**settings, **provenance.package_versions()})
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda *_: stop.set())
            supervisor.watch_parent(stop.set)
            supervisor.watch_asked(config.output, stop.set)
            last = [*stages][-1]
            for name, stage in stages.items():
                # Waits for rank 0, which writes what the stage before leaves behind.
                finished = from_main_rank(checkpoint_dir.is_finished(stage.output))
                if finished and name != last:  # the last stage's trainer only says so
                    continue
                check(stage, ranks.world_size, on_gpu=on_gpu(), reshard=reshard)
                if name and ranks.is_main:
                    supervisor.say(f"stage {name}, in {stage.output}")
                trainer = Trainer(stage, ranks, supervisor.say, stop, reshard=reshard)
                try:
                    trainer.fit()
                except Stopped as stopped:
                    return supervisor.leave(config.output, ranks.rank, trainer.step, EXIT_STOPPED, str(stopped))
                trainer.engine.close()
                trainer = None
                gc.collect()  # DeepSpeed's parts refer to each other; the next stage needs their memory
            leave_process_group()
            if ranks.is_main and results_file is not None:
                _write_figures(stages, results_file)
            return 0
    except UserError as error:
        step = trainer.step if trainer else 0
        return supervisor.leave(config.output, ranks.rank, step, EXIT_USER_ERROR, str(error))
    except Exception as error:  # the last place where a rank can say what happened to it
        traceback.print_exc()
        step = trainer.step if trainer else 0
        message = f"{type(error).__name__}: {error}"
        lost_peer = is_lost_peer(error)
        return supervisor.leave(config.output, ranks.rank, step, EXIT_FAILURE, message, lost_peer=lost_peer)


def _write_figures(stages: Mapping[str, ExperimentConfig], file: Path) -> None:
    """The figures of the last stage; of a curriculum also those of each stage, by name."""
    figures = {name: json.loads((s.output / checkpoint_dir.RESULTS).read_text("utf-8")) for name, s in stages.items()}
    results = {**figures[[*stages][-1]], **({} if "" in stages else {"stages": figures})}
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _mark_failed(stages: Mapping[str, ExperimentConfig], code: int) -> None:
    """Tells MLflow of an end that rank 0 could not tell of itself."""
    begun = [(stage, run) for stage in stages.values() if (run := checkpoint_dir.read_run(stage.output)) is not None]
    if not begun or code in (EXIT_STOPPED, EXIT_USER_ERROR):
        return
    config, run = begun[-1]
    if run.run_id is None:
        return
    from pipeline.tracking import writer

    try:
        writer.end_run(config.tracking, config.output, run.run_id, "FAILED")
    except Exception as error:  # MLflow raises errors of many libraries; the message about the job matters more
        print(f"pal: MLflow does not answer ({type(error).__name__}): the run is not marked as failed", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
