"""The faults that `pal drill` injects into one real training run.

The run goes through all faults, in jobs of the real command; its loss curve is then compared with that of the same run
without faults. `pipeline/drill.py` calls `run`.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from pipeline.launch import rank_process
from pipeline.tracking import writer
from pipeline.training import checkpoint_dir, run_dir
from tests.faults.drill_job import SECRET, DrillFailed, Job, steps_of

NO_SERVER = "tracking.uri=http://127.0.0.1:1"
STEPS_PER_CHECKPOINT = 10
COLLECTIVE_TIMEOUT_S = 15
LOSS_TOLERANCE = 1e-6  # between runs on different numbers of ranks
STEPS_COMPARED = 5  # after the last resharding
STEPS_ON_ONE_RANK = 5


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        fault: what was injected.
        happened: how the run reacted.
        steps_lost: steps that were done and had to be repeated.
        recovered: whether the reaction was the expected one.
    """

    fault: str
    happened: str
    steps_lost: int
    recovered: bool


def run(config: str, overrides: Sequence[str], out: Path) -> list[Outcome]:
    """Injects all faults into a run of this experiment, in the folder `out`.

    Raises:
        DrillFailed: a job did not reach the point at which a fault can be injected.
    """
    return Drill(config, overrides, out).run()


def _newest(output: Path) -> int:
    return next((checkpoint_dir.read_record(path).step for path in checkpoint_dir.list_checkpoints(output)), 0)


class Drill:
    """Injects the faults, in an order that needs few starts of a job."""

    def __init__(self, config: str, overrides: Sequence[str], out: Path) -> None:
        self.out, self.run_folder = out, out / "run"
        self._command = [sys.executable, "-m", "pipeline.train", config, *overrides]
        self._command += [f"train.checkpoint.every_steps={STEPS_PER_CHECKPOINT}", "train.checkpoint.keep=2"]
        self._command += ["train.log_every_steps=1", f"train.collective_timeout_s={COLLECTIVE_TIMEOUT_S}"]
        self.steps = load_config(ExperimentConfig, config, overrides).train.steps
        self._outcomes: list[Outcome] = []
        self._jobs = 0

    def run(self) -> list[Outcome]:
        """Injects all faults; see `run`."""
        shared_memory = _shared_memory()
        with self._job("undisturbed") as undisturbed:
            if undisturbed.wait():
                raise DrillFailed(f"the undisturbed run failed: see {undisturbed.log}")
        with self._job("run", NO_SERVER) as job:
            job.wait_until("rank 0", (job.output / rank_process.RANKS / "rank-0.json").is_file)
            self._start_second_job()  # while this one builds its engine
            job.wait_until("checkpoint", lambda: _newest(self.run_folder) > 0)
            job.train_further()
            self._request_stop(job)
        damaged = self._damage_newest_checkpoint()
        with self._job("run", NO_SERVER, "--max-restarts", "2") as job:
            self._resume_from_older_checkpoint(job, damaged)
            self._kill_rank(job)
            self._hang_rank(job)
            self._fill_disk(job)
            self._kill_all(job)
        self._change_number_of_ranks()
        self._overflow_gradients()
        self._check_run(shared_memory)
        return self._outcomes

    @contextmanager
    def _job(self, output: str, *arguments: str, nproc: int = 2) -> Iterator[Job]:
        self._jobs += 1
        command = [*self._command, f"output={self.out / output}", *arguments, "--nproc", str(nproc)]
        job = Job(command, self.out / output, self.out / f"{self._jobs:02}.log")
        try:
            yield job
        finally:
            if job.process.poll() is None:
                job.process.kill()  # its ranks notice and exit

    def _record(self, fault: str, happened: str, steps_lost: int, recovered: bool) -> None:
        self._outcomes.append(Outcome(fault, happened, steps_lost, recovered))
        logger.info("%s: %s", fault, happened)

    # ---- the faults -------------------------------------------------------------------------------------------------

    def _start_second_job(self) -> None:
        with self._job("run") as second:
            refused = second.wait() == EXIT_USER_ERROR and "is in use by" in second.text
        self._record("two jobs on one folder", "the second one is refused in one line", 0, refused)

    def _request_stop(self, job: Job) -> None:
        started = time.monotonic()
        job.process.send_signal(signal.SIGUSR1)
        code, duration_s = job.wait(), time.monotonic() - started
        lost = steps_of(self.run_folder) - _newest(self.run_folder)
        self._record("SIGUSR1", f"saved and exited with code {code} in {duration_s:.1f} s", lost, code == EXIT_STOPPED)

    def _damage_newest_checkpoint(self) -> int:
        newest = checkpoint_dir.list_checkpoints(self.run_folder)[0]
        file = max(
            (newest / name for name in checkpoint_dir.read_record(newest).files), key=lambda path: path.stat().st_size
        )
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return _newest(self.run_folder)

    def _resume_from_older_checkpoint(self, job: Job, damaged: int) -> None:
        job.wait_for_text("resumed from")
        lost = damaged - self._resumed_at(job)
        recovered = "is damaged" in job.text and lost > 0
        self._record("a flipped bit in the newest checkpoint", "reported; the previous one is used", lost, recovered)

    def _kill_rank(self, job: Job) -> None:
        self._lose_rank(job, signal.SIGKILL, "rank 1 killed", 1)

    def _hang_rank(self, job: Job) -> None:
        self._lose_rank(job, signal.SIGSTOP, "rank 1 hangs", 2)

    def _lose_rank(self, job: Job, number: signal.Signals, fault: str, restart: int) -> None:
        job.train_further()
        started = time.monotonic()
        job.rank(1).send_signal(number)
        job.wait_for_text(f"restart {restart} of")
        duration_s, step = time.monotonic() - started, steps_of(self.run_folder)
        is_named = job.text.count("rank 1 exited or hung") == restart
        job.wait_for_text("resumed from", restart + 1)
        lost = step - self._resumed_at(job)
        self._record(fault, f"named with its step after {duration_s:.1f} s, restarted", lost, is_named)

    def _fill_disk(self, job: Job) -> None:
        """Limits the size of the ranks' files, which to them looks like a full disk."""
        job.train_further()
        previous = _newest(self.run_folder)
        for rank in (0, 1):
            resource.prlimit(job.rank(rank).pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        job.wait_for_text("is not saved")
        is_intact = _newest(self.run_folder) == previous and checkpoint_dir.verify(
            checkpoint_dir.list_checkpoints(self.run_folder)[0]
        )
        for rank in (0, 1):
            resource.prlimit(job.rank(rank).pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        job.wait_until("checkpoint", lambda: _newest(self.run_folder) > previous)
        self._record(
            "a full disk", "reported; the last checkpoint is intact, the next one is saved", 0, bool(is_intact)
        )

    def _kill_all(self, job: Job) -> None:
        job.train_further()
        ranks = [job.rank(rank) for rank in (0, 1)]
        started = time.monotonic()
        job.process.kill()
        job.wait_until("exit of the ranks", lambda: not any(map(_is_alive, ranks)), running=False)
        lost = steps_of(self.run_folder) - _newest(self.run_folder)
        self._record("the whole job killed", f"its ranks exited after {time.monotonic() - started:.1f} s", lost, True)

    def _change_number_of_ranks(self) -> None:
        with self._job("run", nproc=1) as job:
            refused = job.wait() == EXIT_USER_ERROR and "add --reshard" in job.text
        newest = _newest(self.run_folder)
        with self._job("run", NO_SERVER, "--reshard", nproc=1) as job:
            job.wait_for_text("resumed from")
            self._one_rank_from = self._resumed_at(job)
            job.wait_for_text(" questions/s ", STEPS_ON_ONE_RANK)
            job.process.send_signal(signal.SIGTERM)
            stopped = job.wait() == EXIT_STOPPED
        with self._job("run", "--reshard") as job:
            finished = job.wait() == 0
            self._two_ranks_from = self._resumed_at(job)
        lost = newest - self._one_rank_from
        self._record("one rank, then two again", "refused, then converted", lost, refused and stopped and finished)

    def _overflow_gradients(self) -> None:
        overrides = ("train.learning_rate=1e30", "train.gradient_clipping=0", "train.max_skipped_steps=3")
        with self._job("not_finite", *overrides, nproc=1) as job:
            code = job.wait()
            skipped = (job.output / "skipped.jsonl").read_text(encoding="utf-8").count("question_ids")
            recovered = code == EXIT_FAILURE and "3 steps in a row" in job.text
        self._record(
            "gradients that stay infinite",
            f"{skipped} steps skipped, their questions recorded, job ended",
            0,
            recovered,
        )

    # ---- the run as a whole ------------------------------------------------------------------------------------------

    def _check_run(self, shared_memory: set[Path]) -> None:
        undisturbed, run = (
            {step: metrics["train/loss"] for step, metrics in writer.read_metrics(folder) if "train/loss" in metrics}
            for folder in (self.out / "undisturbed", self.run_folder)
        )
        differences = {step: abs(run.get(step, math.inf) - loss) for step, loss in undisturbed.items()}
        on_two_ranks = max(d for step, d in differences.items() if step <= self._one_rank_from)
        # Later on, training amplifies rounding errors beyond those of resharding itself.
        after_resharding = max(
            differences[step] for step in range(self._one_rank_from + 1, self._two_ranks_from + STEPS_COMPARED + 1)
        )
        happened = f"losses differ by {on_two_ranks:g} before resharding, {after_resharding:.1e} after it"
        recovered = on_two_ranks == 0 and after_resharding <= LOSS_TOLERANCE
        self._record("all of them: the loss curve", happened, 0, recovered)
        self._record("no MLflow until the last job", *self._uploaded())
        leftover = _shared_memory() - shared_memory
        self._record("shared memory after all faults", f"{len(leftover)} files left", 0, not leftover)
        leaks = [path for path in self.out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        self._record("a secret in the environment", f"in {len(leaks)} of the files written", 0, not leaks)

    def _uploaded(self) -> tuple[str, int, bool]:
        run = run_dir.read_run(self.run_folder)
        state = json.loads((self.run_folder / writer.STATE).read_text(encoding="utf-8"))
        size = (self.run_folder / writer.METRICS).stat().st_size
        complete = run is not None and run.run_id is not None and state["sent_bytes"] == size
        return f"{state['sent_bytes']} of {size} bytes of metrics uploaded by then", 0, complete

    def _resumed_at(self, job: Job) -> int:
        return int(job.text.rpartition("resumed from")[2].partition("at step")[2].split()[0])


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("deepspeed_*"))
