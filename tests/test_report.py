"""A report holds every run of the experiment in every file with unchanged values, and is logged back to MLflow."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import plots
from pipeline.core.errors import UserError
from pipeline.experiments import tables
from pipeline.experiments.run_report import write_report
from pipeline.report import main
from pipeline.tracking.reader import LOSS, TrainedRun
from pipeline.tracking.writer import EVALUATIONS

UNSCORED = "withheld-test"  # a benchmark whose publishers keep the answers
VARIANTS = {"plits": (0.90, 1.4), "lal": (0.92, 0.8), "pal_v3": (0.94, 0.9)}


def scores(accuracy: float) -> dict[str, Any]:
    group = {"accuracy": accuracy, "ci95": [accuracy - 0.03, accuracy + 0.02], "questions": 60, "clips": 10}
    return {**group, "by_task": {"what": group}, "by_domain": {"music": group, "sound": group}}


def log_run(
    client: MlflowClient, experiment: str, name: str, accuracy: float | None, memory: float, folder: Path
) -> str:
    run = client.create_run(experiment, run_name=name)
    run_id = run.info.run_id
    for key, value in (("model.integration", name), ("train.seed", "0"), ("output", f"runs/{name}")):
        client.log_param(run_id, key, value)
    for step in (1, 2, 3, 2, 3):  # steps 2 and 3 again, as after a resume
        client.log_metric(run_id, LOSS, 4 / step, step=step)
    for column, value in (("final_loss", 0.1), ("samples_per_s", 30.0), ("peak_memory_gib", memory)):
        client.log_metric(run_id, column, value)
    if accuracy is not None:
        file = folder / "held-out.json"
        file.write_text(
            json.dumps({**scores(accuracy), "swapped_audio": scores(0.3), "majority_baseline": scores(0.35)})
        )
        client.log_artifact(run_id, str(file), EVALUATIONS)
    client.set_terminated(run_id, "FINISHED" if accuracy is not None else "FAILED")
    return run_id


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    artifacts = (folder / "artifacts").as_uri()
    experiment = client.create_experiment("demo", artifact_location=artifacts)
    for name, (accuracy, memory) in VARIANTS.items():
        log_run(client, experiment, name, accuracy, memory, folder)
    mixed = client.create_experiment("mixed", artifact_location=artifacts)
    log_run(client, mixed, "lal", 0.5, 1.0, folder)
    log_run(client, mixed, "lal", None, 1.0, folder)
    client.create_experiment("empty", artifact_location=artifacts)
    withheld = client.create_experiment("withheld", artifact_location=artifacts)
    file = folder / f"{UNSCORED}.json"
    file.write_text(json.dumps({"unscored": 9, "clips": 3}))
    for name in ("plits", "lal"):
        run_id = log_run(client, withheld, name, 0.5, 1.0, folder)
        client.log_artifact(run_id, str(file), EVALUATIONS)
    log_scaling(client, client.create_experiment("scaling", artifact_location=artifacts), folder)
    return uri


def log_scaling(client: MlflowClient, experiment: str, folder: Path) -> None:
    """Logs the trials of a sweep: three sizes, two depths, three seeds; loss = 40 parameters ** -0.2 within 0.1 %."""
    client.create_run(experiment, run_name="sweep", tags={"pal.kind": "sweep"})
    for number, (size, depth, seed) in enumerate(itertools.product((1, 2, 4), ("1/4", "1/2"), (0, 1, 2))):
        run_id = client.create_run(experiment, run_name=f"run-{number}").info.run_id
        layers = [0] if depth == "1/4" else [0, 1]
        params = {
            "model.integration": "lal",
            "model.language_model": f"models/size-{size}",
            "model.num_audio_layers": depth,
            "train.seed": str(seed),
            "resolved.audio_layers": str([layers]),
            "resolved.total_parameters": str(size * 10**6),
        }
        for key, value in params.items():
            client.log_param(run_id, key, value)
        loss = 40 * (size * 1e6) ** -0.2 * (1 + 0.001 * (seed - 1))
        accuracy = 0.5 + 0.1 * size + 0.05 * len(layers) + 0.001 * seed
        metrics = {"final_loss": loss, "text_tokens": 1e5, "samples_per_s": 30 / size, "peak_memory_gib": 1.0 * size}
        for name, metric in metrics.items():
            client.log_metric(run_id, name, metric)
        file = folder / "held-out.json"
        file.write_text(json.dumps(scores(accuracy)))
        client.log_artifact(run_id, str(file), EVALUATIONS)
        client.set_terminated(run_id, "FINISHED")


def test_report_holds_every_run_in_every_file(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, results_file = tmp_path / "report", tmp_path / "report.json"
    assert main(["demo", "--uri", uri, "--out", str(out), "--json", str(results_file)]) == 0
    results = json.loads(results_file.read_text())
    assert set(results) == {"table", "fits", "files"}
    assert [row["run"] for row in results["table"]] == list(VARIANTS)
    row = results["table"][1]
    assert row["accuracy"] == pytest.approx(0.92)
    assert (row["ci95_low"], row["ci95_high"]) == pytest.approx((0.89, 0.94))
    assert row["accuracy_music"] == pytest.approx(0.92)
    assert (row["swapped_audio_accuracy"], row["majority_baseline_accuracy"]) == (0.3, 0.35)
    assert (row["peak_memory_gib"], row["samples_per_s"], row["final_loss"]) == (0.8, 30.0, 0.1)
    assert row["model.integration"] == "lal"
    assert "train.seed" not in row, "a parameter that is the same in all runs is left out"
    assert "output" not in row

    names = {Path(file).name for file in results["files"]}
    assert names == {
        "report.md",
        "report.csv",
        "loss.png",
        "accuracy_peak_memory_gib_held-out.png",
        "accuracy_samples_per_s_held-out.png",
        "accuracy_by_domain_held-out.png",
    }
    assert all(Path(file).stat().st_size > 100 for file in results["files"])
    markdown = (out / "report.md").read_text()
    assert all(f"]({name})" in markdown for name in names if name.endswith(".png"))
    assert "| lal | 92.0 (89.0 to 94.0) | 92.0 | 92.0 | 30.0 | 35.0 | 0.100 | 30.0 | 0.80 |" in markdown
    assert "| what | 90.0 | 92.0 | 94.0 |" in markdown
    with (out / "report.csv").open() as stream:
        assert [float(line["accuracy"]) for line in csv.DictReader(stream)] == [a for a, _ in VARIANTS.values()]
    printed = capsys.readouterr().out
    assert all(name in printed for name in VARIANTS)
    assert "92.0 (89.0 to 94.0)" in printed


def test_a_report_is_logged_back_once_and_is_no_run_of_the_next_report(uri: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["demo", "--uri", uri, "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["table"]) == len(VARIANTS)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo")
    reports = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "report"]
    assert len(reports) == 1
    assert {Path(file.path).name for file in client.list_artifacts(reports[0].info.run_id, "report")} >= {"report.md"}


def test_runs_without_evaluation_or_with_the_same_name_are_shown(uri: str, tmp_path: Path) -> None:
    assert main(["mixed", "--uri", uri, "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    done, failed = json.loads((tmp_path / "r.json").read_text())["table"]
    assert done["run"] != failed["run"]
    assert (done["status"], failed["status"]) == ("FINISHED", "FAILED")
    assert failed["accuracy"] is None
    assert done["accuracy"] == 0.5


def test_word_error_rates_are_in_the_tables() -> None:
    rates = {"wer": 0.4, "wer_ci95": [0.3, 0.5], "wer_whisper_english": 0.35}
    with_words = scores(0.5) | rates
    with_words["by_task"]["transcription"] = {**with_words["by_task"]["what"], **rates}
    runs = [
        TrainedRun(name, name, 0.0, {}, name, "FINISHED", {}, {}, [], {"held-out": evaluation})
        for name, evaluation in (("lal", with_words), ("plits", scores(0.5)))
    ]
    headings, rows = tables.comparison_cells(tables.make_table(runs))
    column = headings.index("WER %\n(95 % interval)")
    assert [row[column] for row in rows] == ["40.0 (30.0 to 50.0)", "-"]
    assert tables.task_cells(runs, "held-out")[1][0] == ["transcription", "50.0 (WER 40.0)", "-"]


def test_the_curve_of_a_failed_run_says_so(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []

    def recording(curves: list[plots.Curve], title: str) -> Any:
        labels.extend(curve.label for curve in curves)
        return plot_loss_curves(curves, title)

    plot_loss_curves = plots.plot_loss_curves
    monkeypatch.setattr(plots, "plot_loss_curves", recording)
    assert main(["mixed", "--uri", uri, "--out", str(tmp_path), "--no-log"]) == 0
    done, failed = labels
    assert "after step" not in done and failed.endswith(" (failed after step 3)")
    assert (tmp_path / "loss.png").is_file()


def test_an_evaluation_without_scores_is_shown_as_unscored(uri: str, tmp_path: Path) -> None:
    assert main(["withheld", "--uri", uri, "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["table"]
    by_benchmark = {(row["run"], row["benchmark"]): (row["accuracy"], row["unscored"]) for row in rows}
    assert by_benchmark == {
        ("plits", "held-out"): (0.5, 0),
        ("plits", UNSCORED): (None, 9),
        ("lal", "held-out"): (0.5, 0),
        ("lal", UNSCORED): (None, 9),
    }
    markdown = (tmp_path / "report.md").read_text()
    assert f"| lal | {UNSCORED} | unscored | - | - |" in markdown
    assert "| lal | held-out | 50.0 (47.0 to 52.0) |" in markdown
    assert "by task: held-out" in markdown and f"by task: {UNSCORED}" not in markdown


def test_runs_whose_only_evaluation_is_unscored_are_reported(tmp_path: Path) -> None:
    runs = [
        TrainedRun(
            name=name,
            label=name,
            started=0.0,
            tags={},
            run_id=name,
            status="FINISHED",
            params={"train.seed": name, "resolved.total_parameters": name},
            metrics={"peak_memory_gib": 1.0, "samples_per_s": 1.0},
            losses=[],
            evaluations={UNSCORED: {"unscored": 9, "clips": 3}},
        )
        for name in ("0", "1")
    ]
    report = write_report("withheld", runs, tmp_path)
    assert [(row["accuracy"], row["unscored"]) for row in report.table] == [(None, 9)] * 2
    assert {file.name for file in report.files} == {"report.md", "report.csv"}


def test_a_scaling_experiment_is_pooled_plotted_and_fitted(uri: str, tmp_path: Path) -> None:
    out, results_file = tmp_path / "report", tmp_path / "report.json"
    assert main(["scaling", "--uri", uri, "--out", str(out), "--json", str(results_file)]) == 0
    results = json.loads(results_file.read_text())
    assert len(results["table"]) == 18, "the run of the sweep is not one of its trials"
    names = {Path(file).name for file in results["files"]}
    assert names >= {"pooled.csv", "trend_audio_layers_held-out.png", "trend_parameters_held-out.png"}
    assert "trend_layer_stride_held-out.png" not in names, "it did not vary"
    with (out / "pooled.csv").open() as stream:
        pooled = list(csv.DictReader(stream))
    assert len(pooled) == 6 and {row["seeds"] for row in pooled} == {"3"}
    on_front = {row["settings"]: row["front_peak_memory_gib"] for row in pooled}
    assert on_front["language_model size-1, num_audio_layers 1/2"] == "True"
    assert on_front["language_model size-1, num_audio_layers 1/4"] == "False"
    fit = results["fits"]["lal"]
    value, low, high = fit["exponents"]["parameters"]
    assert low < -0.2 < high and value == pytest.approx(-0.2, abs=0.01)
    assert fit["exponents"]["audio_layers"][0] == pytest.approx(0, abs=0.01)
    assert len(fit["held_out"]) == 6 and all(each["inside"] for each in fit["held_out"])
    assert "6 of 6 inside" in (out / "report.md").read_text()

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("scaling").experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("pal.kind") == "sweep"]
    assert not [run for run in runs if run.info.run_name == "report"]
    assert {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "report")} >= {"report.md"}


@pytest.mark.parametrize(
    ("experiment", "fault"),
    [("empty", "has no runs"), ("demmo", "did you mean 'demo'")],
)
def test_an_experiment_without_runs_is_refused(uri: str, tmp_path: Path, experiment: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        main([experiment, "--uri", uri, "--out", str(tmp_path)])


def test_answers_need_a_sweep(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no sweep"):
        main(["demo", "--uri", uri, "--out", str(tmp_path), "--answers", str(tmp_path / "answers.md")])


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with pytest.raises(UserError, match="no such MLflow database") as error:
        main(["demo", "--uri", f"sqlite:///{database}", "--out", str(tmp_path)])
    assert all(
        name in str(error.value) for name in (str(database), "--uri or MLFLOW_TRACKING_URI", "beside the output")
    )
    assert not database.exists()
