"""`pal bench train`: the training loop against the bare DeepSpeed engine on the same batches in memory, in one run.

Both leave out starting, checkpoints and validation. The bare engine is measured before and after the loop, since a
machine does not stay the same for long."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError, run_command
from pipeline.core.ranks import is_rank, read_ranks
from pipeline.engine import Engine, init_process_group, leave_process_group
from pipeline.launch import rank_process, supervisor
from pipeline.launch.subprocesses import make_small_experiment

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.training.trainer import Trainer

CLIPS = 300
WARM_UP_STEPS = 5
FIGURES = "figures.json"
MLFLOW_START_S = 120.0


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if is_rank():
        return _run_rank(load_config(ExperimentConfig, arguments.config, arguments.overrides))
    on_gpu, nproc = supervisor.devices(arguments.nproc)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = [f"train.steps={arguments.steps}", "train.epochs=null", "train.tokens=null", "stages={}"]
        once = [f"train.checkpoint.every_steps={arguments.steps}", "data.validation=null", f"output={folder / 'run'}"]
        overrides = [*arguments.overrides, *length, *once]
        config = arguments.config or "demo"
        print(f"{arguments.steps} steps of {config} on {nproc} ranks, and twice as many of the bare engine")
        if arguments.dry_run:
            return 0
        if arguments.config is None:
            overrides[:0] = make_small_experiment(folder, CLIPS, "demo_language_model")
        code, message = supervisor.supervise(
            [config, *overrides],
            folder / "run",
            supervisor.Placement(nproc, on_gpu),
            module="pipeline.bench.train",
        )
        if code:
            print(f"pal: {message}", file=sys.stderr)
            return code
        text = (folder / "run" / FIGURES).read_text(encoding="utf-8")
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pal bench train", description=__doc__)
    parser.add_argument("config", nargs="?", help="an experiment (default: the demo's, on a corpus made for it)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine (default: its GPUs, or 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _run_rank(config: ExperimentConfig) -> int:
    ranks = read_ranks()
    rank_process.register_rank(config.output, ranks.rank)
    try:
        from pipeline.training.trainer import Trainer

        init_process_group(ranks, config.train.collective_timeout_s)
        rank_process.watch_parent(lambda: os._exit(EXIT_FAILURE))
        trainer = Trainer(config, ranks, rank_process.report, threading.Event())
        figures = measure(trainer)
        if ranks.is_main:
            (config.output / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        trainer.engine.close()
        leave_process_group()
        return 0
    except UserError as error:
        return rank_process.record_exit(config.output, ranks.rank, 0, EXIT_USER_ERROR, str(error))


def measure(trainer: Trainer) -> dict[str, float]:
    """Bare engine, loop, bare engine again, all over the same batches; the mean of the bare speeds is compared with."""
    state = trainer.loader.state_dict()
    steps = list(islice(trainer.loader, trainer.train.steps))
    trainer.loader.load_state_dict(state)
    prepared = [trainer.inputs_of_step(micro_batches) for micro_batches in steps]
    deadline = time.monotonic() + MLFLOW_START_S
    while trainer.tracker is not None and trainer.tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)  # MLflow's start is not the loop's work
    _bare_steps_per_s(trainer.engine, prepared[:WARM_UP_STEPS])  # what is made on first use
    before = _bare_steps_per_s(trainer.engine, prepared)
    trainer.fit()
    after = _bare_steps_per_s(trainer.engine, prepared)
    loop = len(steps) * trainer.ranks.world_size / trainer.throughput.elapsed_s if trainer.throughput.elapsed_s else 0.0
    engine = 2 / (1 / before + 1 / after)
    return {
        "loop_steps_per_s": loop,
        "engine_steps_per_s": engine,
        "ratio": loop / engine,
        "data_wait_fraction": trainer.throughput.wait_s / trainer.throughput.elapsed_s,
        "engine_steps_per_s_before": before,
        "engine_steps_per_s_after": after,
    }


def _bare_steps_per_s(engine: Engine, prepared: Sequence[Sequence[dict[str, Any]]]) -> float:
    engine.barrier()
    start = time.perf_counter()
    for micro_batches in prepared:
        for number, inputs in enumerate(micro_batches, start=1):
            loss = engine.backward(inputs, last=number == len(micro_batches))
        engine.step(1.0)
    float(loss)  # waits for the device
    engine.barrier()
    return len(prepared) / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command(main))
