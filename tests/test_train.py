"""A user's mistake is one line and exit code 2, before any process starts; the dry run prints what would be trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, UserError, run_command
from pipeline.core.feature_contract import load_contract
from pipeline.core.files import lock_folder
from pipeline.launch import rank_process, supervisor
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.checkpoint_dir import CheckpointRecord
from pipeline.training.run_dir import RunRecord
from tests.helpers.feature_sets import write_feature_set
from tests.helpers.jobs import write_experiment


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("experiment")).parent


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(supervisor.subprocess, "Popen", refuse)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)


Break = Callable[[Path, dict[str, Any]], None]


def set_key(path: str, value: Any) -> Break:
    def change(_: Path, config: dict[str, Any]) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            config = config[parent]
        config[key] = value

    return change


def features_of_another_encoder(folder: Path, config: dict[str, Any]) -> None:
    write_feature_set(folder / "other", [1, 1], encoders={"whisper": 4})
    config["data"]["train"] = str(folder / "other")


def validation_of_another_encoder(folder: Path, config: dict[str, Any]) -> None:
    contract = write_feature_set(folder / "changed", [1, 1], encoders={"log_mel": 4})
    config["data"]["validation"] = str(contract)


def output_of_another_run(folder: Path, config: dict[str, Any]) -> None:
    run_dir.write_run(folder / "taken", RunRecord(identity={"train.seed": 7}))
    config["output"] = str(folder / "taken")


MISTAKES: dict[str, tuple[Break, str]] = {
    "unknown key": (set_key("train.learning_rat", 1), "did you mean 'learning_rate'"),
    "wrong type": (set_key("train.steps", "many"), "train.steps"),
    "batch that does not divide": (set_key("train.global_batch_size", 7), "use a multiple of"),
    "missing shards": (set_key("data.train", "/no/such/folder"), "does not exist"),
    "shards of another encoder": (features_of_another_encoder, "not of 'log_mel'"),
    "held-out shards of another encoder": (validation_of_another_encoder, "fingerprint"),
    "audio_layers beyond the model": (set_key("model.audio_layers", [0, 5]), "layers are 0 to 1"),
    "no such language model": (set_key("model.language_model", "/no/such/model"), "language_model"),
    "a password in a place": (set_key("tracking.uri", "http://me:hunter22@host"), "tracking.uri: holds a password"),
    "no such ZeRO policy": (set_key("train.zero", "zero9"), "ZeRO policy"),
    "output folder of another run": (output_of_another_run, "belongs to another run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = MISTAKES[name]
    config = yaml.safe_load((original / "config.yaml").read_text())
    config["output"] = str(tmp_path / "run")
    change(tmp_path, config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_command(train.main, [str(tmp_path / "config.yaml"), "--nproc", "2"]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert expected in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_yaml_syntax_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("train: [1,\n")
    assert run_command(train.main, [str(tmp_path / "config.yaml")]) == EXIT_USER_ERROR
    assert "YAML syntax error" in capsys.readouterr().err


def test_another_number_of_ranks(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    record = CheckpointRecord(
        step=4,
        world_size=4,
        zero_stage=2,
        config_sha256="",
        data={},
        progress={},
        checksums={},
        run_id=None,
        versions={},
        files={},
    )
    output = tmp_path / "run"
    checkpoint_dir.commit(checkpoint_dir.begin(output, 4), record)
    overrides = [str(tmp_path / "config.yaml"), f"output={output}"]
    assert run_command(train.main, [*overrides, "--nproc", "2"]) == EXIT_USER_ERROR  # checkpoints without an owner
    config = train.load_config(train.ExperimentConfig, overrides[0], overrides[1:])
    identity = run_dir.run_identity(config, load_contract(config.data.train).fingerprint, None)
    run_dir.write_run(output, RunRecord(identity=identity))
    assert run_command(train.main, [*overrides, "--nproc", "2"]) == EXIT_USER_ERROR
    assert "written by 4 ranks, this job has 2; add --reshard" in capsys.readouterr().err


def test_an_output_in_use(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "LOCK_PATIENCE_S", 0.1)
    with lock_folder(tmp_path, run_dir.LOCK), pytest.raises(UserError, match="in use"):
        train.main([str(original / "config.yaml"), f"output={tmp_path}"])


def test_dry_run_prints_what_would_be_trained(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [str(original / "config.yaml"), "--dry-run", f"output={output}", "train.trainable=connector"]
    assert train.main([*arguments, "--nproc", "2"]) == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text.partition("---\n")[0])
    assert tree["train"]["zero"] == "zero2" and tree["train"]["trainable"] == "connector"
    assert "lal stream of log_mel: layers [0]" in text and "plits stream of log_mel" in text
    total, trained = (int(n.replace(",", "")) for n in _numbers(text, "parameters:"))
    assert 0 < trained < total
    assert "8 questions in 8 sequences on 2 ranks, 2 micro-batches each" in text and "tokens per step" in text
    assert not output.exists()


def test_adapters_are_counted_as_trained(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = []
    for lora in ("null", "{rank: 2}"):
        arguments = [str(original / "config.yaml"), "--dry-run", f"output={tmp_path / 'run'}", f"train.lora={lora}"]
        assert train.main([*arguments, "train.trainable=connector"]) == 0
        trained.append(int(_numbers(capsys.readouterr().out, "parameters:")[1].replace(",", "")))
    # q_proj is 32 x 32 and v_proj 32 x 16 (2 key heads of 8), in 2 layers: rank x (in + out) each.
    assert trained[1] - trained[0] == 2 * (2 * (32 + 32) + 2 * (32 + 16))


STAGES = ("stages.first={train: {trainable: connector}, data: {tasks: [what]}}", "stages.second={train: {epochs: 1}}")


def test_dry_run_describes_each_stage(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert train.main([str(original / "config.yaml"), f"output={output}", *STAGES, "--dry-run", "--nproc", "2"]) == 0
    _, first, second = capsys.readouterr().out.split("\nstage ")
    assert first.startswith(f"first, in {output}/01-first") and second.startswith(f"second, in {output}/02-second")
    # 16 clips with 3 questions each, of the tasks what, count, what; 8 questions a step
    assert "12 steps on 32 questions about 16 clips" in first and "6 steps on 48 questions about 16 clips" in second
    trained = [int(_numbers(text, "parameters:")[1].replace(",", "")) for text in (first, second)]
    assert 0 < trained[0] < trained[1]
    assert not output.exists()


def test_a_stage_whose_origin_has_not_run_is_refused(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(original / "config.yaml"), f"output={tmp_path / 'run'}", *STAGES, "--stage", "second"]
    assert run_command(train.main, command) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "starts from" in error and "01-first, which is not finished; run that first" in error
    assert len(error.strip().splitlines()) == 1


def _numbers(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [word for word in line.split() if word[0].isdigit()]


Failure = tuple[int, int, str, bool]  # rank, exit code, message, whether it lost another rank; in order of time


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        (
            [(1, EXIT_FAILURE, "gloo: closed", True), (0, EXIT_FAILURE, "no memory", False)],
            EXIT_FAILURE,
            "rank 0 failed",
        ),
        ([(1, EXIT_USER_ERROR, "shard: is damaged; repair it", False)], EXIT_USER_ERROR, "shard: is damaged"),
        ([(0, EXIT_STOPPED, "stopped", False), (1, EXIT_STOPPED, "stopped", False)], EXIT_STOPPED, "stopped"),
        (
            [(0, EXIT_FAILURE, "gloo: closed", True)],
            EXIT_FAILURE,
            "rank 1 exited or hung without an error message after step 3",
        ),
        (
            [(0, EXIT_FAILURE, "gloo: closed", True), (1, EXIT_FAILURE, "gloo: closed", True)],
            EXIT_FAILURE,
            "rank 0, 1 lost the other ranks after step 3",
        ),
        ([], EXIT_FAILURE, "the last line"),
    ],
)
def test_the_cause_of_an_end_is_reported_and_not_its_consequences(
    tmp_path: Path, failures: list[Failure], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAL_SUPERVISED", "1")
    (tmp_path / supervisor.LOG).write_text("the last line\n")
    for rank in (0, 1):
        rank_process.register_rank(tmp_path, rank)
    for rank, rank_code, text, lost_peer in failures:
        assert rank_process.record_exit(tmp_path, rank, 3, rank_code, text, lost_peer=lost_peer) == rank_code
    exit_code, explanation = supervisor._explain(1, tmp_path)
    assert exit_code == code and message in explanation
    assert supervisor._explain(0, tmp_path) == (0, "")


def test_ranks_are_named_with_their_hosts_if_there_are_several(tmp_path: Path) -> None:
    for rank, host in enumerate(["worker-1", "worker-2", "worker-2"]):
        rank_process._write(tmp_path / rank_process.RANKS / f"rank-{rank}.json", {"rank": rank, "host": host, "pid": 1})
    lost = {"rank": 0, "step": 3, "code": 1, "message": "", "lost_peer": True, "time": 0.0}
    rank_process._write(tmp_path / rank_process.FAILURES / "rank-0.json", lost)
    assert rank_process.lost_ranks(tmp_path).startswith(
        "rank 1, 2 on worker-2 exited or hung without an error message after step 3"
    )
    rank_process.remove_stale_records(tmp_path, 2)
    assert rank_process.lost_ranks(tmp_path).startswith("rank 1 on worker-2 exited or hung")


def test_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# machines\nworker-0 slots=8\n\nworker-1 slots=4\n")
    assert supervisor.read_hostfile(tmp_path / "hosts", None) == {"worker-0": 8, "worker-1": 4}
    assert supervisor.read_hostfile(tmp_path / "hosts", 2) == {"worker-0": 2, "worker-1": 2}
    for text in ("worker-0\n", "a slots=1\na slots=1\n", "# nothing\n"):
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(UserError, match="slots=N"):
            supervisor.read_hostfile(tmp_path / "hosts", None)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert supervisor._environment(supervisor.Placement(1, False))["OMP_NUM_THREADS"] == str(cores)
    assert supervisor._environment(supervisor.Placement(2 * cores, False))["OMP_NUM_THREADS"] == "1"


def test_dry_run_reports_an_unfit_question_as_training_does(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(original / "config.yaml"), "--dry-run", f"output={tmp_path / 'run'}", "data.max_text_tokens=2"]
    assert run_command(train.main, arguments) == EXIT_USER_ERROR
    assert (
        "48 of 48 questions are unfit (48 for text_tokens; for example question 'clip-0/0'" in capsys.readouterr().err
    )
