"""`pal demo`: from audio files to compared models on this machine, each stage a process of its own.

Owns the order of the stages and what is finished; every stage is a command that a user can give by hand.
"""

from __future__ import annotations

import argparse
import fcntl
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
from pipeline.core.errors import UserError, run_command
from pipeline.core.files import atomic_write
from pipeline.launch.subprocesses import CommandFailed, run_logged

VARIANTS = ("plits", "lal", "pal_v3")
EXPERIMENT = "demo"
CORPUS_SEED = 1  # not 0, on whose held-out clips the corpus was made easy enough
CONFIGS = ("demo", "demo_prepare", "demo_language_model")
SETTINGS, STAGES, LOCK = "demo.json", "stages", ".lock"
FOLDER_VARIABLE = "PAL_DEMO_FOLDER"  # tells the processes of a demo, so that a restart can end what a kill left behind
SIGN_OF_LIFE_S = 20.0


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        command: goes to `python -m`, with `--json` for its figures.
        headline: keys of the figures that are shown when it is done.
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like a Ctrl-C: the stage's process first
    try:
        with only_demo_in(out):
            keep_settings(out, stages)
            run_stages(out, stages)
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    wall_s = time.monotonic() - started
    if arguments.json:
        results = {"variants": _variants(out), "wall_s": round(wall_s, 1)}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nFinished in {_clock(wall_s)}. Report and pictures: {out / 'report' / 'report.md'}")
    print(f"The runs in MLflow's UI: `make ui` (mlflow ui --backend-store-uri {_tracking_uri(out)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal demo",
        description="A synthetic corpus, its features, the same small model trained as PLITS, LAL and PAL, and their "
        "comparison. Stopped at any moment and started again, it goes on from what is finished.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="everything goes here (default: runs/demo)")
    parser.add_argument("--clips", type=int, default=1500, help="clips of the corpus (default: 1500)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks that train (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the shipped config `demo`")
    return parser


def plan_stages(out: Path, clips: int, nproc: int, overrides: Sequence[str] = ()) -> list[Stage]:
    """The commands of a demo in `out`, in order."""
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
    """Holds the folder; processes that a killed demo left at work in it are ended first.

    Raises:
        UserError: another demo is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, however this process ends
        except OSError as error:
            raise UserError(out, "another `pal demo` is at work here", "wait for it, or give another --out") from error
        _end_processes_of(out)
        os.environ[FOLDER_VARIABLE] = str(out.resolve())
        try:
            yield
        finally:
            del os.environ[FOLDER_VARIABLE]


def _end_processes_of(out: Path) -> None:
    import psutil

    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ended meanwhile, or is another user's
            if process.environ().get(FOLDER_VARIABLE) == str(out.resolve()) and process.pid != os.getpid():
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=30)


def keep_settings(out: Path, stages: Sequence[Stage]) -> None:
    """Writes down what the demo in this folder is, or checks that it is this one.

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
    """Runs what is not finished. A stage's completion file is written last, so a killed stage runs again; the
    commands themselves go on from what they had done.

    Raises:
        CommandFailed: a command failed.
    """
    for number, stage in enumerate(stages, start=1):
        label = f"[{number:2}/{len(stages)}] {stage.name:16}"
        done = _stage_file(out, stage.name, "done.json")
        if done.is_file() and number < len(stages):  # the last one prints the comparison: it always runs
            print(f"{label} finished before", flush=True)
            continue
        print(f"{label} ...", flush=True)
        started = time.monotonic()
        shown = number == len(stages)
        figures, last_line = run_logged(
            stage.name,
            stage.command,
            _stage_file(out, stage.name, "log"),
            _stage_file(out, stage.name, "figures.json"),
            show=shown,
            sign_of_life_s=None if shown else SIGN_OF_LIFE_S,
            alive=partial(_say, label, started),
        )
        wall_s = round(time.monotonic() - started, 1)
        atomic_write(
            done, json.dumps({"command": stage.command, "wall_s": wall_s, "figures": figures}, indent=2).encode()
        )
        _say(label, started, ", ".join(f"{key} {figures[key]:.4g}" for key in stage.headline) or last_line)


def _say(label: str, started: float, text: str) -> None:
    print(f"{label} {_clock(time.monotonic() - started):12} {text}", flush=True)


def _variants(out: Path) -> dict[str, Any]:
    """What `--json` tells of each variant; accuracies are 0 to 1."""
    variants = {}
    for variant in VARIANTS:
        train = _figures(out, f"train {variant}")
        (scores,) = _figures(out, f"evaluate {variant}").values()
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


def _figures(out: Path, stage: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(_stage_file(out, stage, "done.json").read_text(encoding="utf-8"))["figures"]
    return figures


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(run_command(main))
