"""Lost ranks: the user sees which ranks they are, and the run resumes.

Known failures of distributed training, and the tests of what prevents them (in `tests/`):

    two ranks of a node use the same shared memory      core/test_ranks.py, training/test_training_job.py
    a rank without audio hangs the others               engine/test_engine.py: a rank with text only
    a resumed run silently starts from scratch          training/test_checkpoint_manager.py: step, position, checksums
    resharding or export loses frozen weights           engine/test_reshard.py, test_export.py
    the job is killed during a save                     training/test_checkpoint_dir.py
    a different number of ranks is refused              engine/test_reshard.py
    data is repeated or skipped after a resume          data/test_sampler.py, data/test_loader.py
    a dead job leaves shared memory behind              training/test_trainer_faults.py, faults/test_drill.py
    bits of a checkpoint rot                            training/test_checkpoint_dir.py, faults/test_drill.py
    the tracking server is unreachable or dies          tracking/test_writer.py, faults/test_drill.py
    a long save exceeds the timeout of collectives      training/test_checkpoint_manager.py: saving in the background
    a loss or gradient is not finite                    engine/test_engine.py, training/test_trainer_faults.py
    no gradient reaches the connector                   training/test_trainer_faults.py
    a default of DeepSpeed changes                      engine/test_ds_config.py
    pre-emption                                         training/test_training_job.py, faults/test_drill.py
    ranks see different numbers of batches              data/test_loader.py
    the disk is full                                    training/test_checkpoint_dir.py, launch/test_supervisor.py
    ranks are started with different settings           training/test_trainer_faults.py
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


def pid_of(rank: int, output: Path) -> int:
    return json.loads((output / rank_process.RANKS / f"rank-{rank}.json").read_text())["pid"]


def test_dead_and_hung_ranks_are_named_and_the_run_resumes(tmp_path: Path) -> None:
    """The run restarts twice: a rank of the first job is killed, and a rank of the second job hangs."""
    config = write_experiment(tmp_path, checkpoint={"every_steps": 2, "keep": 2}, steps=STEPS, collective_timeout_s=15)
    output = tmp_path / "run"
    job = start_job(config, "--nproc", 2, "--max-restarts", 2)
    wait_for_step(job, output, 5)
    first = pid_of(1, output)
    os.kill(first, signal.SIGKILL)
    newest = checkpoint_dir.read_record(checkpoint_dir.list_checkpoints(output)[0]).step
    wait_for_step(job, output, newest + 20)
    second = pid_of(1, output)
    assert second != first
    os.kill(second, signal.SIGSTOP)
    code, out, err = end_of(job, output)
    assert code == 0, err
    assert err.count("rank 1 exited or hung without an error message after step") == 2, err
    assert "restart 2 of 2" in err and out.count("resumed from") == 2
    assert checkpoint_dir.list_checkpoints(output)[0].name == f"step-{STEPS:06d}"
