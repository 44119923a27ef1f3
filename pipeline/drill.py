"""`pal drill`: injects faults into a real training run on this machine and prints what became of it.

One run goes through all faults in turn, in jobs of the real command; its curve is then compared with that of the same
run undisturbed."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipeline.config import ExperimentConfig, load_config
from pipeline.core.console import format_table
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError, run_command
from pipeline.launch import rank_process
from pipeline.launch.subprocesses import CommandFailed, make_small_experiment
from pipeline.tracking import writer
from pipeline.training import checkpoint_dir, run_dir

CLIPS = 60
PATIENCE_S = 240.0
SECRET = "planted-by-pal-drill"
NO_SERVER = "tracking.uri=http://127.0.0.1:1"
RUNNING_STEPS = 5  # that a job does before the next fault
EVERY_STEPS = 10  # a checkpoint
HANG_S = 15
SAME_CURVE = 1e-6  # of the loss, across numbers of ranks
STEPS_COMPARED = 5  # after the last resharding
STEPS_ALONE = 5


@dataclass(frozen=True)
class Outcome:
    """One row of the table; `steps_lost` were done and had to be done again."""

    fault: str
    happened: str
    steps_lost: int
    recovered: bool


class DrillFailed(Exception):
    """A job did not come to the point where a fault can be injected."""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    out: Path = arguments.out.absolute()
    if out.exists():
        raise UserError(out, "exists", "remove it, or give another --out")
    out.mkdir(parents=True)
    config = arguments.config
    started = time.monotonic()
    try:
        if config is None:
            config = "drill"
            os.environ["DS_ACCELERATOR"] = "cpu"  # two ranks on any machine
            arguments.overrides[:0] = make_small_experiment(out, CLIPS, "drill_language_model")
        outcomes = Drill(config, arguments.overrides, out).run()
    except (CommandFailed, DrillFailed) as failure:
        print(f"pal: {failure}", file=sys.stderr)
        return EXIT_FAILURE
    wall_s = time.monotonic() - started
    if arguments.json:
        rows = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps({"faults": rows, "wall_s": round(wall_s, 1)}, indent=2) + "\n", "utf-8")
    print(f"\n{table(outcomes)}\n\n{wall_s:.0f} s; what every job said: {out}/*.log")
    return 0 if all(outcome.recovered for outcome in outcomes) else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pal drill", description=__doc__)
    parser.add_argument("config", nargs="?", help="an experiment to drill (default: a small one, made here)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="a new folder (default: runs/drill)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    return parser


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in columns, for a terminal."""
    rows = [("fault", "what happened", "steps lost", "recovered")]
    rows += [(o.fault, o.happened, str(o.steps_lost), "yes" if o.recovered else "NO") for o in outcomes]
    return format_table(rows)


class Job:
    """`pal train` on one output folder, and what it says."""

    def __init__(self, command: Sequence[str], output: Path, log: Path) -> None:
        self.output, self.log = output, log
        environment = {**os.environ, "DRILL_SECRET_KEY": SECRET}
        with log.open("w", encoding="utf-8") as file:
            # A session of its own: nothing that is killed here reaches the drill.
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, what: str, done: Callable[[], bool], *, running: bool = True) -> None:
        """Returns when `done`.

        Raises:
            DrillFailed: it ended before, or did nothing of the kind in a long time.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if running and self.process.poll() is not None:
                raise DrillFailed(f"the job ended with code {self.process.returncode} before {what}: see {self.log}")
            if time.monotonic() > deadline:
                raise DrillFailed(f"no {what} after {PATIENCE_S:.0f} s: see {self.log}")
            time.sleep(0.02)

    def wait_for_words(self, words: str, times: int = 1) -> None:
        self.wait_until(f"'{words}'", lambda: self.said.count(words) >= times)

    def run_on(self) -> None:
        """Lets it train for some steps more."""
        step = _steps(self.output)
        self.wait_until("more steps", lambda: _steps(self.output) >= step + RUNNING_STEPS)

    def rank(self, rank: int) -> psutil.Process:
        record = json.loads((self.output / rank_process.RANKS / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return psutil.Process(record["pid"])

    def end(self) -> int:
        self.wait_until("end", lambda: self.process.poll() is not None, running=False)
        return self.process.returncode


def _steps(output: Path) -> int:
    """The last step that is recorded, be it done again later."""
    file = output / writer.METRICS
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def _newest(output: Path) -> int:
    return next((checkpoint_dir.read_record(path).step for path in checkpoint_dir.list_checkpoints(output)), 0)


class Drill:
    """The faults, in an order that needs few starts."""

    def __init__(self, config: str, overrides: Sequence[str], out: Path) -> None:
        self.out, self.run_folder = out, out / "run"
        self._command = [sys.executable, "-m", "pipeline.train", config, *overrides]
        self._command += [f"train.checkpoint.every_steps={EVERY_STEPS}", "train.checkpoint.keep=2"]
        self._command += ["train.log_every_steps=1", f"train.collective_timeout_s={HANG_S}"]
        self.steps = load_config(ExperimentConfig, config, overrides).train.steps
        self._outcomes: list[Outcome] = []
        self._jobs = 0

    def run(self) -> list[Outcome]:
        """All faults.

        Raises:
            DrillFailed: a job did not come to the point where a fault can be injected.
        """
        shared_memory = _shared_memory()
        with self._job("undisturbed") as undisturbed:
            if undisturbed.end():
                raise DrillFailed(f"the undisturbed run failed: see {undisturbed.log}")
        with self._job("run", NO_SERVER) as job:
            job.wait_until("rank 0", (job.output / rank_process.RANKS / "rank-0.json").is_file)
            self._second_job()  # while this one builds its engine
            job.wait_until("checkpoint", lambda: _newest(self.run_folder) > 0)
            job.run_on()
            self._ask_to_stop(job)
        damaged = self._damage_newest()
        with self._job("run", NO_SERVER, "--max-restarts", "2") as job:
            self._fallen_back(job, damaged)
            self._kill_rank(job)
            self._hang_rank(job)
            self._fill_disk(job)
            self._kill_all(job)
        self._other_ranks()
        self._not_finite()
        self._compare(shared_memory)
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
                job.process.kill()  # its ranks notice

    def _note(self, fault: str, happened: str, lost: int, recovered: bool) -> None:
        self._outcomes.append(Outcome(fault, happened, lost, recovered))
        print(f"{fault}: {happened}", flush=True)

    # ---- the faults -------------------------------------------------------------------------------------------------

    def _second_job(self) -> None:
        with self._job("run") as second:
            refused = second.end() == EXIT_USER_ERROR and "is in use by" in second.said
        self._note("two jobs on one folder", "the second is refused in one line", 0, refused)

    def _ask_to_stop(self, job: Job) -> None:
        began = time.monotonic()
        job.process.send_signal(signal.SIGUSR1)
        code, took_s = job.end(), time.monotonic() - began
        lost = _steps(self.run_folder) - _newest(self.run_folder)
        self._note("SIGUSR1", f"saved and ended with code {code} in {took_s:.1f} s", lost, code == EXIT_STOPPED)

    def _damage_newest(self) -> int:
        newest = checkpoint_dir.list_checkpoints(self.run_folder)[0]
        file = max(
            (newest / name for name in checkpoint_dir.read_record(newest).files), key=lambda path: path.stat().st_size
        )
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return _newest(self.run_folder)

    def _fallen_back(self, job: Job, damaged: int) -> None:
        job.wait_for_words("resumed from")
        told = "is damaged" in job.said and "going back to the checkpoint before" in job.said
        lost = damaged - self._resumed_at(job)
        self._note("a flipped bit in the newest checkpoint", "told; the one before is taken", lost, told and lost > 0)

    def _kill_rank(self, job: Job) -> None:
        self._lose_rank(job, signal.SIGKILL, "rank 1 killed", 1)

    def _hang_rank(self, job: Job) -> None:
        self._lose_rank(job, signal.SIGSTOP, "rank 1 hangs", 2)

    def _lose_rank(self, job: Job, number: signal.Signals, fault: str, restart: int) -> None:
        job.run_on()
        began = time.monotonic()
        job.rank(1).send_signal(number)
        job.wait_for_words(f"restart {restart} of")
        took_s, step = time.monotonic() - began, _steps(self.run_folder)
        named = job.said.count("rank 1 exited or hung") == restart
        job.wait_for_words("resumed from", restart + 1)
        lost = step - self._resumed_at(job)
        self._note(fault, f"named with its step after {took_s:.1f} s, restarted", lost, named)

    def _fill_disk(self, job: Job) -> None:
        """Files of the ranks cannot grow, which is what they see of a full disk."""
        job.run_on()
        before = _newest(self.run_folder)
        for rank in (0, 1):
            resource.prlimit(job.rank(rank).pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        job.wait_for_words("is not saved")
        kept = _newest(self.run_folder) == before and checkpoint_dir.verify(
            checkpoint_dir.list_checkpoints(self.run_folder)[0]
        )
        for rank in (0, 1):
            resource.prlimit(job.rank(rank).pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        job.wait_until("checkpoint", lambda: _newest(self.run_folder) > before)
        self._note("a full disk", "told, the last checkpoint is whole, the next one saved", 0, bool(kept))

    def _kill_all(self, job: Job) -> None:
        job.run_on()
        ranks = [job.rank(rank) for rank in (0, 1)]
        began = time.monotonic()
        job.process.kill()
        job.wait_until("end of the ranks", lambda: not any(map(_is_alive, ranks)), running=False)
        lost = _steps(self.run_folder) - _newest(self.run_folder)
        self._note("the whole job killed", f"its ranks ended after {time.monotonic() - began:.1f} s", lost, True)

    def _other_ranks(self) -> None:
        with self._job("run", nproc=1) as job:
            refused = job.end() == EXIT_USER_ERROR and "add --reshard" in job.said
        begun = _newest(self.run_folder)
        with self._job("run", NO_SERVER, "--reshard", nproc=1) as job:
            job.wait_for_words("resumed from")
            self._alone = self._resumed_at(job)
            job.wait_for_words(" questions/s ", STEPS_ALONE)
            job.process.send_signal(signal.SIGTERM)
            stopped = job.end() == EXIT_STOPPED
        with self._job("run", "--reshard") as job:
            finished = job.end() == 0
            self._together = self._resumed_at(job)
        lost = begun - self._alone
        self._note("one rank, then two again", "refused, then converted", lost, refused and stopped and finished)

    def _not_finite(self) -> None:
        ruin = ("train.learning_rate=1e30", "train.gradient_clipping=0", "train.max_skipped_steps=3")
        with self._job("not_finite", *ruin, nproc=1) as job:
            code = job.end()
            skipped = (job.output / "skipped.jsonl").read_text(encoding="utf-8").count("question_ids")
            ended = code == EXIT_FAILURE and "3 steps in a row" in job.said
        self._note("gradients that stay infinite", f"{skipped} skipped, their questions written, ended", 0, ended)

    # ---- what it comes to -------------------------------------------------------------------------------------------

    def _compare(self, shared_memory: set[Path]) -> None:
        undisturbed, run = (
            {step: metrics["train/loss"] for step, metrics in writer.read_metrics(folder) if "train/loss" in metrics}
            for folder in (self.out / "undisturbed", self.run_folder)
        )
        differences = {step: abs(run.get(step, math.inf) - loss) for step, loss in undisturbed.items()}
        same = max(d for step, d in differences.items() if step <= self._alone)
        # Later, training itself makes more of any rounding than resharding does.
        after = max(differences[step] for step in range(self._alone + 1, self._together + STEPS_COMPARED + 1))
        told = f"losses differ by {same:g} up to the first resharding, {after:.1e} over both"
        self._note("all of them: the curve", told, 0, same == 0 and after <= SAME_CURVE)
        self._note("no MLflow until the last job", *self._uploaded())
        left = _shared_memory() - shared_memory
        self._note("shared memory after all these deaths", f"{len(left)} files left", 0, not left)
        leaks = [path for path in self.out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        self._note("a secret in the environment", f"in {len(leaks)} of the files written", 0, not leaks)

    def _uploaded(self) -> tuple[str, int, bool]:
        run = run_dir.read_run(self.run_folder)
        state = json.loads((self.run_folder / writer.STATE).read_text(encoding="utf-8"))
        size = (self.run_folder / writer.METRICS).stat().st_size
        complete = run is not None and run.run_id is not None and state["sent_bytes"] == size
        return f"{state['sent_bytes']} of {size} bytes of metrics uploaded then", 0, complete

    def _resumed_at(self, job: Job) -> int:
        return int(job.said.rpartition("resumed from")[2].partition("at step")[2].split()[0])


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("deepspeed_*"))


if __name__ == "__main__":
    sys.exit(run_command(main))
