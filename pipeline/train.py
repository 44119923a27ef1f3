"""`pal train CONFIG`: checks everything that is cheap to check, then runs the job under the `deepspeed` launcher, or on
the nodes of a Ray cluster.

The same module is the job itself: `deepspeed --module pipeline.train CONFIG` starts it on every rank."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ExperimentConfig, choose_stages, dump_config, load_config
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, run_command
from pipeline.core.ranks import is_rank, read_ranks
from pipeline.launch import supervisor
from pipeline.training import run_dir
from pipeline.training.job import mark_failed, run_rank, write_figures
from pipeline.training.preflight import check, describe

if TYPE_CHECKING:  # imports torch, which `--help` must not
    pass


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides)
    stages = choose_stages(config, arguments.stage)
    if is_rank():
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
    with run_dir.lock(config.output):
        pass  # refuse here, in one line, before any process is started; rank 0 then holds it
    passed_on = [arguments.config, *arguments.overrides, *(["--reshard"] if arguments.reshard else [])]
    passed_on += [f"--stage={arguments.stage}"] if arguments.stage else []
    started = time.time()
    per_node = arguments.nproc if arguments.hostfile else nproc
    placement = supervisor.Placement(per_node, on_gpu, arguments.hostfile, arguments.ray)
    for restart in range(arguments.max_restarts + 1):
        code, message = supervisor.supervise(passed_on, config.output, placement)
        if code != EXIT_FAILURE or restart == arguments.max_restarts:
            break
        print(f"pal: {message}\npal: restart {restart + 1} of {arguments.max_restarts}", file=sys.stderr, flush=True)
    results = outputs[-1] / run_dir.RESULTS
    if code == 0 and (not results.is_file() or results.stat().st_mtime < started):
        code, message = EXIT_FAILURE, f"the launcher ended without an error and without {results}"
    if code:
        mark_failed(stages, code)
        print(f"pal: {message}", file=sys.stderr)
    elif arguments.json:
        write_figures(stages, arguments.json)
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


if __name__ == "__main__":
    sys.exit(run_command(main))
