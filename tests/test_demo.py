"""The stages of the demo run once each, in order, and resume after a kill; a user error in a stage keeps its line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.core.console import configure_logging
from pipeline.core.errors import UserError
from pipeline.demo import FOLDER_VARIABLE, STAGES, Stage, keep_settings, main, only_demo_in, run_stages
from pipeline.launch.subprocesses import CommandFailed

# Appends its name to the list of commands that ran, then ends as its argument says.
FAKE_COMMAND = """
import json, sys, time
name, ending, ran, figures = *sys.argv[1:4], sys.argv[4].removeprefix("--json=")
with open(ran, "a") as file:
    file.write(name + "\\n")
if ending == "mistake":
    sys.exit(print("pal: data.train: does not exist; prepare it", file=sys.stderr) or 2)
if ending == "endless":
    print("step 1", flush=True)
    time.sleep(60)
if ending == "crash":
    raise RuntimeError("the disk is full")
with open(figures, "w") as file:
    json.dump({"loss": 0.5}, file)
print("result of", name)
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_command.py").write_text(FAKE_COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "ran"


def stage(name: str, ran: Path, ending: str = "good") -> Stage:
    return Stage(name, ("fake_command", name, ending, str(ran)), headline=("loss",))


def test_finished_stages_are_skipped_and_the_last_always_runs(
    tmp_path: Path, ran: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    out = tmp_path / "demo"
    stages = [stage("one", ran), stage("two", ran, "crash"), stage("report", ran)]
    with pytest.raises(CommandFailed, match="the disk is full") as failure:
        run_stages(out, stages)
    assert failure.value.exit_code == 1
    assert "two.log" in str(failure.value)
    run_stages(out, [stages[0], stage("two", ran), stages[2]])
    run_stages(out, [stages[0], stage("two", ran), stages[2]])
    assert ran.read_text().split() == ["one", "two", "two", "report", "report"]
    output = capfd.readouterr()
    printed = output.out + output.err
    assert printed.count("result of report") == 2, "every start prints the comparison"
    assert "result of one" not in printed
    assert "loss 0.5" in printed
    assert "[ 1/3] one" in printed


def test_a_stage_without_its_completion_file_runs_again(tmp_path: Path, ran: Path) -> None:
    out = tmp_path / "demo"
    stages = [stage("one", ran), stage("report", ran)]
    run_stages(out, stages)
    (done,) = out.glob(f"{STAGES}/one.done.json")
    done.rename(done.with_name(f"{done.name}.tmp"))  # killed while writing it
    run_stages(out, stages)
    assert ran.read_text().split() == ["one", "report", "one", "report"]


def test_a_user_error_of_a_stage_keeps_its_line_and_code(tmp_path: Path, ran: Path) -> None:
    with pytest.raises(CommandFailed) as failure:
        run_stages(tmp_path / "demo", [stage("one", ran, "mistake"), stage("report", ran)])
    assert (str(failure.value), failure.value.exit_code) == ("data.train: does not exist; prepare it", 2)


def test_a_folder_holds_one_demo_with_one_set_of_settings(tmp_path: Path, ran: Path) -> None:
    tmp_path.joinpath("demo").mkdir()
    keep_settings(tmp_path / "demo", [stage("one", ran)])
    keep_settings(tmp_path / "demo", [stage("one", ran)])
    with pytest.raises(UserError, match="other settings"):
        keep_settings(tmp_path / "demo", [stage("two", ran)])


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with only_demo_in(tmp_path), pytest.raises(UserError, match="is in use by process"), only_demo_in(tmp_path):
        pass
    with only_demo_in(tmp_path):
        pass


def test_processes_of_a_killed_demo_are_ended_and_no_others(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    mine, other = tmp_path / "mine", tmp_path / "other"
    leftover = subprocess.Popen(sleep, env=os.environ | {FOLDER_VARIABLE: str(mine)})
    stranger = subprocess.Popen(sleep, env=os.environ | {FOLDER_VARIABLE: str(other)})
    try:
        time.sleep(0.2)
        with only_demo_in(mine):
            assert leftover.poll() is not None
            assert stranger.poll() is None
    finally:
        leftover.kill()
        stranger.kill()


def test_dry_run_prints_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["--out", str(out), "--dry-run", "train.steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if "pipeline.train" in line] == [
        "train plits",
        "train lal",
        "train pal_v3",
    ]
    trained = [line.partition(": ")[2].split() for line in lines if "pipeline.train" in line]
    differing = {
        word.partition("=")[0] for words in zip(*trained, strict=True) if len(set(words)) > 1 for word in words
    }
    assert differing == {"model.integration", "output"}, "all three share data, order, steps, rates and seed"
    assert all("train.steps=3" in words for words in trained)
    assert not out.exists()


def test_a_signal_ends_the_process_of_the_stage_and_exits_with_130(tmp_path: Path, ran: Path) -> None:
    """A signal to the demo alone must not leave the process of the stage running."""
    code = (
        "import sys; from pathlib import Path; from pipeline import demo\n"
        "demo.HEARTBEAT_S = 0.2\n"
        f"stages = [demo.Stage('one', ('fake_command', 'one', 'endless', {str(ran)!r}))] * 2\n"
        "demo.plan_stages = lambda *_: stages\n"
        f"sys.exit(demo.run_command(demo.main, ['--out', {str(tmp_path / 'demo')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("step 1" in line for line in lines), "a heartbeat shows the last line of the log"
        (child,) = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(timeout=20) == 130
        assert not child.is_running()
    finally:
        process.kill()
