"""`pal bench train`: compares the training loop with the bare DeepSpeed engine on the same batches in memory, in one
run.

Neither includes startup, checkpoints or validation. The bare engine is measured before and after the loop, because the
speed of a machine drifts."""

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
from pipeline.core.arguments import add_config, add_dry_run, add_json, write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError, run_command
from pipeline.core.ranks import is_rank, read_ranks
from pipeline.engine import Engine, init_process_group, leave_process_group
from pipeline.launch import rank_process, supervisor
from pipeline.launch.subprocesses import make_small_experiment

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.training.trainer import Trainer

CLIPS = 300
WARM_UP_STEPS = 5
RESULTS = "results.json"
MLFLOW_START_S = 120.0


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    if is_rank():
        return _run_rank(load_config(ExperimentConfig, arguments.config, arguments.overrides))
    on_gpu, nproc = supervisor.devices(arguments.nproc)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = [f"train.steps={arguments.steps}", "train.epochs=null", "train.tokens=null", "stages={}"]
        only_training = [f"train.checkpoint.every_steps={arguments.steps}", "data.validation=null"]
        overrides = [*arguments.overrides, *length, *only_training, f"output={folder / 'run'}"]
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
            logger.error(message)
            return code
        results = json.loads((folder / "run" / RESULTS).read_text(encoding="utf-8"))
    print(json.dumps(results, indent=2))
    write_results(results, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal bench train",
        description="Compare the training loop with the bare DeepSpeed engine on the same batches in memory, in one "
        "run. Without a config, measure the demo's, on a corpus made for it.",
    )
    add_config(parser, optional=True)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--nproc", type=int, metavar="N", help="number of ranks (default: one per GPU, else 1)")
    add_json(parser)
    add_dry_run(parser, "print what would be measured")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _run_rank(config: ExperimentConfig) -> int:
    ranks = read_ranks()
    rank_process.configure_rank_logging(ranks.rank)
    rank_process.register_rank(config.output, ranks.rank)
    try:
        from pipeline.training.trainer import Trainer

        init_process_group(ranks, config.train.collective_timeout_s)
        rank_process.watch_parent(lambda: os._exit(EXIT_FAILURE))
        trainer = Trainer(config, ranks, threading.Event())
        results = measure(trainer)
        if ranks.is_main:
            (config.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        trainer.engine.close()
        leave_process_group()
        return 0
    except UserError as error:
        return rank_process.record_exit(config.output, ranks.rank, 0, EXIT_USER_ERROR, str(error))


def measure(trainer: Trainer) -> dict[str, float]:
    """Runs the bare engine, the loop, and the bare engine again, all over the same batches.

    Returns:
        steps per second of the loop and of the bare engine (the harmonic mean of both measurements), their ratio, and
        the share of the loop's time that it waits for data.
    """
    state = trainer.loader.state_dict()
    steps = list(islice(trainer.loader, trainer.train.steps))
    trainer.loader.load_state_dict(state)
    prepared = [trainer.inputs_of_step(micro_batches) for micro_batches in steps]
    deadline = time.monotonic() + MLFLOW_START_S
    while trainer.tracker is not None and trainer.tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)  # the startup of MLflow is not part of the loop
    _bare_steps_per_s(trainer.engine, prepared[:WARM_UP_STEPS])  # DeepSpeed and torch allocate on first use
    speed_before = _bare_steps_per_s(trainer.engine, prepared)
    trainer.fit()
    speed_after = _bare_steps_per_s(trainer.engine, prepared)
    loop = len(steps) * trainer.ranks.world_size / trainer.throughput.elapsed_s if trainer.throughput.elapsed_s else 0.0
    engine = 2 / (1 / speed_before + 1 / speed_after)
    return {
        "loop_steps_per_s": loop,
        "engine_steps_per_s": engine,
        "ratio": loop / engine,
        "data_wait_fraction": trainer.throughput.wait_s / trainer.throughput.elapsed_s,
        "engine_steps_per_s_before": speed_before,
        "engine_steps_per_s_after": speed_after,
    }


def _bare_steps_per_s(engine: Engine, prepared: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Returns the steps per second of the engine alone over micro-batches that are on the device."""
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
