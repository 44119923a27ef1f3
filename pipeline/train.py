"""`pal train CONFIG`: checks everything that is cheap to check, then runs the job under the `deepspeed` launcher or on
the nodes of a Ray cluster.

This module is also the job: `deepspeed --module pipeline.train CONFIG` starts it on every rank."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import ExperimentConfig, choose_stages, dump_config, load_config
from pipeline.core.arguments import add_config, add_dry_run, add_json, write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, run_command
from pipeline.core.files import lock_folder
from pipeline.core.ranks import is_rank, read_ranks
from pipeline.launch import supervisor
from pipeline.training import run_dir
from pipeline.training.job import mark_failed, read_results, run_rank
from pipeline.training.preflight import check, describe


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
    stages = choose_stages(config, arguments.stage)
    if is_rank():
        return run_rank(config, stages, read_ranks(), arguments.json, reshard=arguments.reshard)
    placement, world_size = _placement(arguments)
    outputs = [stage.output for stage in stages.values()]
    checked = [
        check(stage, world_size, on_gpu=placement.on_gpu, reshard=arguments.reshard, planned=outputs[:number])
        for number, stage in enumerate(stages.values())
    ]
    if arguments.dry_run:
        print(dump_config(config).rstrip(), "---", sep="\n")
        for (name, stage), (contract, streams) in zip(stages.items(), checked, strict=True):
            if name:
                print(f"stage {name}, in {stage.output}")
            print(describe(stage, contract, streams, world_size))
        return 0
    with lock_folder(config.output, run_dir.LOCK, run_dir.LOCK_PATIENCE_S):
        pass  # refuses a folder in use before any process is started; rank 0 then holds the lock
    code = _run_job(arguments, config, stages, placement)
    if code:
        mark_failed(stages, code)
    elif arguments.json:
        write_results(read_results(stages), arguments.json)
    return code


def _placement(arguments: argparse.Namespace) -> tuple[supervisor.Placement, int]:
    """Returns where the ranks run, and how many there are."""
    on_gpu, nproc = _devices(arguments.ray, arguments.nproc)
    if arguments.hostfile is None:
        return supervisor.Placement(nproc, on_gpu, None, arguments.ray), nproc
    hosts = supervisor.read_hostfile(arguments.hostfile, arguments.nproc)
    return supervisor.Placement(arguments.nproc, on_gpu, arguments.hostfile, arguments.ray), sum(hosts.values())


def _devices(ray_address: str | None, nproc: int | None) -> tuple[bool, int]:
    if ray_address is None:
        return supervisor.devices(nproc)
    from pipeline.launch import ray_launcher  # imports ray, which takes seconds

    return ray_launcher.devices(ray_address, nproc)


def _run_job(
    arguments: argparse.Namespace,
    config: ExperimentConfig,
    stages: Mapping[str, ExperimentConfig],
    placement: supervisor.Placement,
) -> int:
    """Runs the job, and again after failures as often as `--max-restarts` allows; returns its exit code."""
    rank_arguments = [arguments.config, *arguments.overrides, *(["--reshard"] if arguments.reshard else [])]
    rank_arguments += [f"--stage={arguments.stage}"] if arguments.stage else []
    started = time.time()
    for restart in range(arguments.max_restarts + 1):
        code, message = supervisor.supervise(rank_arguments, config.output, placement)
        if code != EXIT_FAILURE or restart == arguments.max_restarts:
            break
        logger.error(message)
        logger.warning(f"restart {restart + 1} of {arguments.max_restarts}")
    results = [*stages.values()][-1].output / run_dir.RESULTS
    if code == 0 and (not results.is_file() or results.stat().st_mtime < started):
        code, message = EXIT_FAILURE, f"the launcher ended without an error and without {results}"
    if code:
        logger.error(message)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal train",
        description="Train one model with DeepSpeed. Rerun the same command to resume from the newest checkpoint. On a "
        "first signal, the run finishes its step, saves a checkpoint and exits with code "
        f"{EXIT_STOPPED}; a second one ends it at once.",
    )
    add_config(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="number of ranks (default: one per GPU, else 1); per host with --hostfile",
    )
    launcher = parser.add_mutually_exclusive_group()
    launcher.add_argument("--hostfile", type=Path, metavar="F", help="DeepSpeed hostfile (one `HOST slots=N` per line)")
    launcher.add_argument("--ray", metavar="ADDRESS", help="Ray cluster address, or `auto`")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="maximum number of automatic restarts after a failure"
    )
    parser.add_argument(
        "--reshard", action="store_true", help="allow resuming from a checkpoint saved with a different number of ranks"
    )
    parser.add_argument("--stage", metavar="NAME", help="run only this stage of the config (default: all, in order)")
    add_dry_run(parser, "check the config, and print what would be trained")
    add_json(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
