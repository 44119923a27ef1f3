"""The Slurm scripts, unchanged except for smaller resources, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.launch import rank_process
from pipeline.tracking.writer import METRICS, read_metrics
from pipeline.training import checkpoint_dir
from tests.helpers.corpora import hashes, prepare_config, prepare_here, write_corpus
from tests.helpers.jobs import LIMIT_S, write_experiment
from tests.helpers.slurm_cluster import Slurm, needs_slurm, slurm_of

pytestmark = [pytest.mark.slurm, needs_slurm, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parents[2] / "cluster" / "slurm"
STEPS = 40
SMALL = ("--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_of(["node1", "node2"], tmp_path_factory.mktemp("slurm") / "cluster") as slurm:
        yield slurm


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("experiment"), steps=STEPS, checkpoint={"every_steps": 30})


def submit(slurm: Slurm, script: str, log: Path, *arguments: object) -> str:
    """Submits a script and returns the job id. `arguments` may begin with further options of sbatch."""
    variables = {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = [argument for argument in arguments if str(argument).startswith("--")]
    positional = [argument for argument in arguments if argument not in options]
    words = ["sbatch", "--parsable", *SMALL, f"--output={log}", *options, SCRIPTS / f"{script}.sbatch", *positional]
    return slurm.run(*words, **variables)


def finished(slurm: Slurm, job: str, log: Path) -> dict[str, str]:
    state = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", limit_s=LIMIT_S)
    assert state["JobState"] == "COMPLETED", f"{state}\n{log.read_text()[-3000:]}"
    return state


def train(slurm: Slurm, experiment: Path, output: Path, *options: str) -> str:
    return submit(slurm, "train", output.with_suffix(".log"), *options, experiment, f"output={output}")


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not (output / METRICS).exists() or not any(s >= step for s, _ in read_metrics(output)):
        assert time.monotonic() < deadline, f"no step {step}: {output.with_suffix('.log').read_text()[-3000:]}"
        time.sleep(0.1)


def signal_ranks(slurm: Slurm, output: Path, name: str) -> None:
    for rank, host in enumerate(slurm.hosts):
        host.run("kill", "-s", name, json.loads((output / rank_process.RANKS / f"rank-{rank}.json").read_text())["pid"])


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, experiment: Path) -> Path:
    """The output of a job without interruption."""
    output = experiment.parent / "undisturbed"
    finished(slurm, train(slurm, experiment, output), output.with_suffix(".log"))
    return output


def assert_equal_runs(one: Path, other: Path) -> None:
    one_losses, other_losses = ([(s, m["train/loss"]) for s, m in read_metrics(output)] for output in (one, other))
    assert len(one_losses) == STEPS and one_losses == other_losses
    weights = sorted(file.name for file in (one / "model").glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes()


@pytest.mark.parametrize("script", ["prepare", "train", "sweep"])
def test_slurm_accepts_every_script(slurm: Slurm, script: str) -> None:
    output = slurm.run("sbatch", "--test-only", "--array=1-2", SCRIPTS / f"{script}.sbatch", "config.yaml", "grid.txt")
    assert "to start at" in output


def test_a_job_that_reaches_its_time_limit_resumes_bit_for_bit(
    slurm: Slurm, experiment: Path, undisturbed: Path
) -> None:
    """Slurm sends the signal, up to a minute early; until then the ranks are paused, because the run is short."""
    output = experiment.parent / "limited"
    job = train(slurm, experiment, output, "--time=3", "--signal=B:USR1@60")
    wait_for_step(output, 5)
    signal_ranks(slurm, output, "STOP")
    log = output.with_suffix(".log")
    deadline = time.monotonic() + 180
    while "the time limit is near" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    signal_ranks(slurm, output, "CONT")
    state = finished(slurm, job, log)
    print(log.read_text())
    assert state["Restarts"] == "1" and "resumed from" in log.read_text()
    assert_equal_runs(undisturbed, output)


def test_a_job_can_be_requeued_repeatedly(slurm: Slurm, experiment: Path, undisturbed: Path) -> None:
    output = experiment.parent / "twice"
    job = train(slurm, experiment, output)
    for step in (5, 20):
        wait_for_step(output, step)
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_for(job, "PENDING", limit_s=60)
    state = finished(slurm, job, output.with_suffix(".log"))
    assert state["Restarts"] == "2"
    assert_equal_runs(undisturbed, output)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Slurm, experiment: Path) -> None:
    output = experiment.parent / "cancelled"
    job = train(slurm, experiment, output)
    wait_for_step(output, 5)
    slurm.run("scancel", job)
    state = slurm.wait_for(job, "CANCELLED", limit_s=60)
    assert state["Restarts"] == "0" and state["ExitCode"] == "75:0"
    time.sleep(10)  # longer than a requeued job would wait
    assert slurm.state(job)["JobState"] == "CANCELLED"
    assert 5 <= checkpoint_dir.read_record(checkpoint_dir.list_checkpoints(output)[0]).step < STEPS


def test_each_element_of_a_sweep_trains_one_line_of_the_grid(slurm: Slurm, experiment: Path) -> None:
    folder = experiment.parent
    grid = folder / "grid.txt"
    grid.write_text("".join(f"train.steps={n} output={folder / f'element-{n}'}\n" for n in (2, 3)))
    log = folder / "sweep-%a.log"
    job = submit(slurm, "sweep", log, "--array=1-2", experiment, grid)
    for element, steps in ((1, 2), (2, 3)):
        finished(slurm, f"{job}_{element}", folder / f"sweep-{element}.log")
        assert len(read_metrics(folder / f"element-{steps}")) == steps


def test_preparation_on_two_nodes_writes_the_bytes_of_one_machine(slurm: Slurm, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "corpus", clips=12)
    config = tmp_path / "prepare.yaml"
    settings = {"encoders": {"log_mel": {"kind": "log_mel"}}, "partition_clips": 4}
    config.write_text(yaml.safe_dump({"manifest": str(manifest), "output": str(tmp_path / "slurm"), **settings}))
    prepare_here(prepare_config(manifest, tmp_path / "local", **settings))
    log = tmp_path / "prepare.log"
    job = submit(slurm, "prepare", log, config)
    finished(slurm, job, log)
    print(log.read_text())
    assert hashes(tmp_path / "slurm") == hashes(tmp_path / "local")
