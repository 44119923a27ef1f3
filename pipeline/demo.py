"""`pal demo`: from audio files to trained, compared models on this machine.

Defines the stages and their order, and records which are finished. Each stage is a process of its own, with a command
that a user could type.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.loading import shipped_config
from pipeline.core.arguments import add_dry_run, add_json, write_results
from pipeline.core.console import format_duration, logger
from pipeline.core.errors import UserError, run_command
from pipeline.core.files import atomic_write, lock_folder
from pipeline.launch.subprocesses import CommandFailed, LoggedCommand, run_logged

VARIANTS = ("plits", "lal", "pal_v3")
EXPERIMENT = "demo"
CORPUS_SEED = 1  # not 0, because the difficulty of the corpus was tuned on the held-out clips of seed 0
CONFIGS = ("demo", "demo_prepare", "demo_language_model")
SETTINGS, STAGES, LOCK = "demo.json", "stages", ".lock"
FOLDER_VARIABLE = "PAL_DEMO_FOLDER"  # marks the processes of a demo, so that a restart can end those a kill left behind
HEARTBEAT_S = 20.0


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: name of the stage, for people and for its files.
        command: module and arguments, which go to `python -m` together with `--json`.
        headline: keys of the results that are shown when the stage is done.
    """

    name: str
    command: tuple[str, ...]
    headline: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    stages = plan_stages(out, arguments.clips, arguments.nproc, arguments.overrides)
    if arguments.dry_run:
        print("\n".join(f"{stage.name}: python -m {shlex.join(stage.command)}" for stage in stages))
        return 0
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: ends the process of the stage first
    try:
        with only_demo_in(out):
            keep_settings(out, stages)
            run_stages(out, stages)
    except CommandFailed as failure:
        logger.error(failure)
        return failure.exit_code
    wall_s = time.monotonic() - started
    if arguments.json:
        write_results({"variants": _variant_results(out), "wall_s": round(wall_s, 1)}, arguments.json)
    print(f"\nFinished in {format_duration(wall_s)}. Report and plots: {out / 'report' / 'report.md'}")
    print(f"To see the runs in MLflow: `make ui` (mlflow ui --backend-store-uri {_tracking_uri(out)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal demo",
        description="Make a synthetic corpus and its features, train the same small model as PLITS, LAL and PAL, and "
        "compare the three. Rerun the same command to resume from what is finished.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--clips", type=int, default=1500, help="clips in the corpus (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="number of ranks (default: %(default)s)")
    add_json(parser)
    add_dry_run(parser, "print the commands without running them")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="overrides of the shipped config `demo`")
    return parser


def plan_stages(out: Path, clips: int, nproc: int, overrides: Sequence[str] = ()) -> list[Stage]:
    """Returns the stages of a demo in `out`, in order."""
    corpus, features, language_model = out / "corpus", out / "features", out / "language_model"
    train_set, test_set = features / "train", features / "test"
    stages = [
        Stage(
            "corpus",
            ("data_prep.synth", str(corpus), f"--clips={clips}", f"--seed={CORPUS_SEED}"),
            ("clips", "questions", "audio_hours"),
        )
    ]
    for part in ("train", "test"):
        paths = (f"manifest={corpus / part}.jsonl", f"output={features / part}")
        stages.append(
            Stage(f"features {part}", ("data_prep.prepare", "demo_prepare", *paths), ("clips", "clips_per_s"))
        )
    stages.append(
        Stage(
            "language model", ("pipeline.scratch", "demo_language_model", str(language_model), f"{corpus}/train.jsonl")
        )
    )
    for variant in VARIANTS:
        settings = (
            f"model.integration={variant}",
            f"model.language_model={language_model}",
            f"data.train={train_set}",
            f"data.validation={test_set}",
            f"output={out / variant}",
            f"tracking.uri={_tracking_uri(out)}",
            f"tracking.experiment={EXPERIMENT}",
            *overrides,
        )
        train = ("pipeline.train", "demo", *settings, f"--nproc={nproc}")
        stages.append(Stage(f"train {variant}", train, ("final_loss", "samples_per_s", "peak_memory_gib")))
    for variant in VARIANTS:
        model = str(out / variant / "model")
        files = (f"--predictions={out / variant / 'predictions.jsonl'}",)
        evaluate = ("pipeline.evaluate", model, str(test_set), "--swap-audio", f"--majority-from={train_set}", *files)
        stages.append(Stage(f"evaluate {variant}", evaluate))
    report = ("pipeline.report", EXPERIMENT, f"--uri={_tracking_uri(out)}", f"--out={out / 'report'}")
    return [*stages, Stage("report", report)]


def _tracking_uri(out: Path) -> str:
    return f"sqlite:///{out / 'mlflow.db'}"


@contextmanager
def only_demo_in(out: Path) -> Iterator[None]:
    """Locks the folder, and ends the processes that a killed demo left running in it.

    Raises:
        UserError: another demo is running in the folder.
    """
    with lock_folder(out, LOCK):
        _end_processes_of(out)
        os.environ[FOLDER_VARIABLE] = str(out.resolve())
        try:
            yield
        finally:
            del os.environ[FOLDER_VARIABLE]


def _end_processes_of(out: Path) -> None:
    import psutil

    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has exited meanwhile, or belongs to another user
            if process.environ().get(FOLDER_VARIABLE) == str(out.resolve()) and process.pid != os.getpid():
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=30)


def keep_settings(out: Path, stages: Sequence[Stage]) -> None:
    """Records the settings of the demo in its folder, or checks that they are the same as those recorded before.

    Raises:
        UserError: the folder holds a demo with other settings.
    """
    settings = {
        "commands": [shlex.join(stage.command) for stage in stages],
        "configs": {name: shipped_config(name).read_text(encoding="utf-8") for name in CONFIGS},
    }
    path = out / SETTINGS
    if not path.exists():
        atomic_write(path, json.dumps(settings, indent=2).encode())
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise UserError(out, "holds a demo with other settings", "remove it, or give another --out")


def run_stages(out: Path, stages: Sequence[Stage]) -> None:
    """Runs the stages that are not finished.

    The completion file of a stage is written last, so a killed stage runs again; its command then resumes by itself.

    Raises:
        CommandFailed: a command failed.
    """
    for number, stage in enumerate(stages, start=1):
        label = f"[{number:2}/{len(stages)}] {stage.name:16}"
        done, is_last = _stage_file(out, stage.name, "done.json"), number == len(stages)
        if done.is_file() and not is_last:  # the last stage prints the comparison, so it always runs
            logger.info("%s already finished", label)
            continue
        logger.info("%s ...", label)
        started = time.monotonic()
        results, last_line = run_logged(
            LoggedCommand(
                stage.name,
                stage.command,
                log=_stage_file(out, stage.name, "log"),
                results=_stage_file(out, stage.name, "figures.json"),
            ),
            show=is_last,
            heartbeat_s=None if is_last else HEARTBEAT_S,
            on_heartbeat=partial(_report, label, started),
        )
        wall_s = round(time.monotonic() - started, 1)
        record = {"command": stage.command, "wall_s": wall_s, "figures": results}
        atomic_write(done, json.dumps(record, indent=2).encode())
        _report(label, started, ", ".join(f"{key} {results[key]:.4g}" for key in stage.headline) or last_line)


def _report(label: str, started: float, text: str) -> None:
    logger.info("%s %-12s %s", label, format_duration(time.monotonic() - started), text)


def _variant_results(out: Path) -> dict[str, Any]:
    """Returns the results of each variant for `--json`; accuracies are 0 to 1."""
    variants = {}
    for variant in VARIANTS:
        train = _results(out, f"train {variant}")
        (scores,) = _results(out, f"evaluate {variant}").values()
        variants[variant] = {
            "accuracy": scores["accuracy"],
            "accuracy_by_domain": {domain: group["accuracy"] for domain, group in scores["by_domain"].items()},
            "swapped_audio_accuracy": scores["swapped_audio"]["accuracy"],
            "majority_baseline_accuracy": scores["majority_baseline"]["accuracy"],
            **{key: train[key] for key in ("samples_per_s", "peak_memory_gib", "final_loss")},
        }
    return variants


def _stage_file(out: Path, stage: str, kind: str) -> Path:
    return out / STAGES / f"{stage.replace(' ', '_')}.{kind}"


def _results(out: Path, stage: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(_stage_file(out, stage, "done.json").read_text(encoding="utf-8"))["figures"]
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
