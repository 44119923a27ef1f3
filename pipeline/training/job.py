"""The training job on one rank: runs every unfinished stage, and records how the job ended."""

from __future__ import annotations

import gc
import json
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ExperimentConfig
from pipeline.config.flat import flatten
from pipeline.core import provenance
from pipeline.core.arguments import write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.core.files import lock_folder
from pipeline.core.ranks import Ranks
from pipeline.engine import (
    from_main_rank,
    init_process_group,
    is_lost_peer,
    leave_process_group,
    on_gpu,
    require_same_everywhere,
)
from pipeline.launch import rank_process
from pipeline.training import run_dir
from pipeline.training.preflight import check

if TYPE_CHECKING:  # imports torch, which `--help` must not
    from pipeline.training.trainer import Trainer


def run_rank(
    config: ExperimentConfig,
    stages: Mapping[str, ExperimentConfig],
    ranks: Ranks,
    results_file: Path | None,
    *,
    reshard: bool,
) -> int:
    """Runs every unfinished stage in order on one rank; records how the rank ended, for the parent.

    Args:
        config: config of the whole job.
        stages: config of each stage by name.
        results_file: where rank 0 also writes the results.
        reshard: resume from a checkpoint of another number of ranks too.

    Returns:
        the exit code of this rank.
    """
    rank_process.configure_rank_logging(ranks.rank)
    trainer: Trainer | None = None
    stop = threading.Event()
    try:
        with ExitStack() as resources:
            if ranks.is_main:
                for folder in dict.fromkeys([config.output, *(stage.output for stage in stages.values())]):
                    resources.enter_context(lock_folder(folder, run_dir.LOCK, run_dir.LOCK_PATIENCE_S))
                rank_process.remove_stale_records(config.output, ranks.world_size)
            rank_process.register_rank(config.output, ranks.rank)
            from pipeline.training.trainer import Stopped, Trainer

            _connect(config, ranks, stop)
            last = [*stages][-1]
            if len(stages) > 1:
                _check_questions([stage for stage in stages.values() if not run_dir.is_finished(stage.output)])
            for name, stage in stages.items():
                # Waits for rank 0, which writes what the previous stage leaves behind.
                finished = from_main_rank(run_dir.is_finished(stage.output))
                if finished and name != last:  # the trainer of a finished last stage only logs that it is finished
                    continue
                check(stage, ranks.world_size, on_gpu=on_gpu(), reshard=reshard)
                if name:
                    logger.info(f"stage {name}, in {stage.output}")
                trainer = Trainer(stage, ranks, stop, reshard=reshard)
                try:
                    trainer.fit()
                except Stopped as stopped:
                    return rank_process.record_exit(config.output, ranks.rank, trainer.step, EXIT_STOPPED, str(stopped))
                trainer.engine.close()
                trainer = None
                gc.collect()  # frees DeepSpeed's reference cycles: the next stage needs their memory
            leave_process_group()
            if ranks.is_main and results_file is not None:
                write_results(read_results(stages), results_file)
            return 0
    except UserError as error:
        step = trainer.step if trainer else 0
        return rank_process.record_exit(config.output, ranks.rank, step, EXIT_USER_ERROR, str(error))
    except Exception as error:  # the parent and the log must learn the reason, whatever it is
        traceback.print_exc()
        step = trainer.step if trainer else 0
        message = f"{type(error).__name__}: {error}"
        lost_peer = is_lost_peer(error)
        return rank_process.record_exit(config.output, ranks.rank, step, EXIT_FAILURE, message, lost_peer=lost_peer)


def _connect(config: ExperimentConfig, ranks: Ranks, stop: threading.Event) -> None:
    """Joins the other ranks, and sets `stop` when a signal or the parent requests the end."""
    init_process_group(ranks, config.train.collective_timeout_s)
    require_same_everywhere({**flatten(config.model_dump(mode="json")), **provenance.package_versions()})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    rank_process.watch_parent(stop.set)
    rank_process.watch_stop_request(config.output, stop.set)


def _check_questions(stages: Sequence[ExperimentConfig]) -> None:
    """Checks the questions of these stages, so that an unfit one in the last is reported before the first begins.

    Raises:
        UserError: a stage would not start.
    """
    from pipeline.data.chat_template import build_chat_template
    from pipeline.training.build import check_questions

    for stage in stages:
        _, chat_template = build_chat_template(stage.model.language_model, stage.data, stage.train.loss_on)
        check_questions(stage, chat_template)


def read_results(stages: Mapping[str, ExperimentConfig]) -> dict[str, Any]:
    """Returns the results of the last stage; those of a curriculum also hold the results of each stage by name."""
    results = {name: json.loads((s.output / run_dir.RESULTS).read_text("utf-8")) for name, s in stages.items()}
    return {**results[[*stages][-1]], **({} if "" in stages else {"stages": results})}


def mark_failed(stages: Mapping[str, ExperimentConfig], code: int) -> None:
    """Sets the status of the MLflow run to FAILED where rank 0 could not do so itself."""
    begun = [(stage, run) for stage in stages.values() if (run := run_dir.read_run(stage.output)) is not None]
    if not begun or code in (EXIT_STOPPED, EXIT_USER_ERROR):
        return
    config, run = begun[-1]
    if run.run_id is None:
        return
    from pipeline.tracking import writer

    try:
        writer.end_run(config.tracking, config.output, run.run_id, "FAILED")
    except Exception as error:  # MLflow raises errors of many libraries; the message about the job matters more
        logger.warning(f"MLflow does not answer ({type(error).__name__}): the run is not marked as failed")
