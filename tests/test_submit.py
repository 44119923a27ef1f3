"""`pal submit` to a real Ray head on this machine that requires a token; secrets are neither sent nor shown."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.config import load_config
from pipeline.core.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from pipeline.core.ranks import free_port
from pipeline.submit import SubmitConfig
from tests.helpers.ray_clusters import LIMIT_S, TOKEN, RayCluster, pal_submit, start_submit

SECRET = "planted-secret-of-this-machine-2718"
VARIABLES = {"MY_SECRET": SECRET, "PLACE": "here"}


def make_folder(folder: Path) -> Path:
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "weights").write_text("many bytes")
    (folder / "hello.txt").write_text("hello")
    return folder


@pytest.mark.parametrize("name", ["MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"])
def test_a_secret_is_not_sent(name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        submit.make_runtime_env(SubmitConfig(environment=[name]), {name: SECRET})
    assert SECRET not in str(caught.value)


def test_a_password_in_a_url_is_not_sent() -> None:
    uri = f"http://me:{SECRET}@tracker"
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        submit.make_runtime_env(SubmitConfig(environment=["MLFLOW_TRACKING_URI"]), {"MLFLOW_TRACKING_URI": uri})


def test_variables_are_selected_by_name(tmp_path: Path) -> None:
    config = SubmitConfig(environment=["HF_HOME"], working_dir=tmp_path)
    sent = submit.make_runtime_env(config, {"HF_HOME": "/models", "OTHER": "stays", "MY_TOKEN": SECRET})
    assert sent["env_vars"]["HF_HOME"] == "/models"
    assert "OTHER" not in sent["env_vars"] and SECRET not in json.dumps(sent)
    with pytest.raises(UserError, match="HF_HOME is not set"):
        submit.make_runtime_env(config, {})


def test_a_command_is_required_and_a_dry_run_shows_no_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="COMMAND"):
        submit.main(["ray_job"])
    monkeypatch.setenv("PLACE", "a value")
    assert submit.main(["ray_job", "environment=[PLACE]", "--dry-run", "--", "pal", "train", "a b"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output)["entrypoint"] == "pal train 'a b'"
    assert "PLACE" in output and "a value" not in output


def test_the_shipped_cluster_is_on_this_machine() -> None:
    assert load_config(SubmitConfig, "ray_job").address.startswith("http://127.0.0.1:")


def test_no_cluster_is_one_line() -> None:
    done = pal_submit(f"http://127.0.0.1:{free_port()}", "--", "true")
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.splitlines()[-1].startswith("pal: address: no job server answers")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    cluster = RayCluster(num_cpus=2)
    try:
        yield cluster.job_server
    finally:
        cluster.close()


@pytest.mark.slow
def test_the_log_and_the_exit_code_come_back_and_no_secret_does(cluster: str, tmp_path: Path) -> None:
    folder, figures = make_folder(tmp_path / "sent"), tmp_path / "figures.json"
    script = f"cat hello.txt; ls; echo $PLACE; echo said {SECRET}; echo secret ${{MY_SECRET:-none}}; exit 3"
    done = pal_submit(
        cluster,
        f"working_dir={folder}",
        "environment=[PLACE]",
        "--json",
        figures,
        "--",
        "sh",
        "-c",
        script,
        **VARIABLES,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(figures.read_text())["status"] == "FAILED"
    lines = done.stdout.splitlines()
    assert "hellohello.txt" in done.stdout.replace("\n", "") and "runs" not in lines
    assert "here" in lines and "secret none" in lines and "said ***" in lines
    assert SECRET not in done.stdout + done.stderr and TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_a_job_and_lets_it_save(cluster: str, tmp_path: Path) -> None:
    folder, saved = make_folder(tmp_path / "sent"), tmp_path / "saved"
    # By default, Ray would kill the command after 3 s.
    script = f"trap 'sleep 6; touch {saved}; echo saved; exit 75' TERM; echo started; while true; do sleep 0.2; done"
    job = start_submit(cluster, f"working_dir={folder}", "--stop-on-interrupt", "--", "sh", "-c", script)
    assert job.stdout is not None
    for line in job.stdout:
        if line == "started\n":
            break
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == EXIT_STOPPED, err
    assert saved.exists() and "saved\n" in out and "started\n" not in out, "every line is shown once, up to the last"


@pytest.mark.slow
def test_a_wrong_token_is_one_line(cluster: str) -> None:
    done = pal_submit(cluster, "--", "true", RAY_AUTH_TOKEN="another-token-altogether")
    assert done.returncode == EXIT_USER_ERROR
    assert "rejects our token" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["random.py", "pipeline.py", "types/__init__.py", "data_prep/__init__.py"])
def test_a_folder_whose_files_would_replace_installed_modules_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    (tmp_path / "my_experiment.py").write_text("")
    with pytest.raises(UserError, match="would replace the module"):
        submit.make_runtime_env(SubmitConfig(working_dir=tmp_path), {})
    checkout = Path(submit.__file__).parents[1]
    assert submit.make_runtime_env(SubmitConfig(working_dir=checkout), {})["working_dir"] == str(checkout)
    excluded = SubmitConfig(working_dir=tmp_path, exclude=["/" + name.partition("/")[0]])
    assert submit.make_runtime_env(excluded, {})["working_dir"] == str(tmp_path)
