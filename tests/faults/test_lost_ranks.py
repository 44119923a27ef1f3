"""Ranks that are lost: what the user is told, and whether the run goes on.

Known failures of this kind of training, and the tests that hold what prevents them (in this folder unless named):

    two ranks of a node take each other's shared memory     ../test_distributed.py: LOCAL_WORLD_SIZE; test_training
    a rank without audio hangs the others                   test_engine: a rank with text only
    a resume starts from scratch unnoticed                  test_keeper: step, position and checksums are compared
    frozen weights are lost by a reshard or an export       test_reshard, test_export, test_keeper
    killed during a save                                    ../test_checkpoint.py: killed while saving
    another number of ranks is refused                      test_reshard
    data repeated or skipped after a resume                 ../data/test_order.py, ../data/test_loader.py, test_training
    shared memory that a dead job leaves                    test_trainer_faults, ../test_drill.py
    bits rot in a checkpoint                                ../test_checkpoint.py, test_export, ../test_drill.py
    the tracking server is away, or dies                    ../test_tracking.py, ../test_drill.py
    a long save runs into the collectives' time limit       test_keeper: training goes on while it is written
    loss or gradient is not finite                          test_engine, test_trainer_faults
    no gradient reaches the connector                       test_trainer_faults
    a default of DeepSpeed moves                            ../test_zero.py
    pre-emption                                             test_training, ../test_drill.py
    ranks see different numbers of batches                  ../data/test_loader.py
    the disk is full                                        test_keeper, ../test_checkpoint.py, ../test_launch.py
    ranks are started with different settings               test_trainer_faults
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from pipeline.launch import rank_process
from pipeline.training import checkpoint_dir
from tests.helpers.jobs import end_of, start_job, wait_for_step, write_experiment

STEPS = 60


def process_of(rank: int, output: Path) -> int:
    return json.loads((output / rank_process.RANKS / f"rank-{rank}.json").read_text())["pid"]


def test_dead_and_hung_ranks_are_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """Restarted twice: the first job loses a rank to SIGKILL, the second waits for one that does nothing any more."""
    config = write_experiment(tmp_path, checkpoint={"every_steps": 2, "keep": 2}, steps=STEPS, collective_timeout_s=15)
    output = tmp_path / "run"
    job = start_job(config, "--nproc", 2, "--max-restarts", 2)
    wait_for_step(job, output, 5)
    first = process_of(1, output)
    os.kill(first, signal.SIGKILL)
    newest = checkpoint_dir.read_record(checkpoint_dir.list_checkpoints(output)[0]).step
    wait_for_step(job, output, newest + 20)
    second = process_of(1, output)
    assert second != first
    os.kill(second, signal.SIGSTOP)
    code, out, err = end_of(job, output)
    assert code == 0, err
    assert err.count("rank 1 exited or hung without an error message after step") == 2, err
    assert "restart 2 of 2" in err and out.count("resumed from") == 2
    assert checkpoint_dir.list_checkpoints(output)[0].name == f"step-{STEPS:06d}"
