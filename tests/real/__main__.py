"""`make real`: from packages with weights and recordings to compared models, on this machine.

Each stage runs once: rerun the same command to resume from what is finished. A stage that was interrupted resumes by
its own means (shards, checkpoints, answers). `OUT/stages` holds the log and the time of every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.arguments import add_json
from pipeline.core.console import configure_logging, format_duration, logger
from pipeline.core.errors import run_command
from pipeline.core.files import atomic_write, lock_folder
from pipeline.launch.subprocesses import CommandFailed, LoggedCommand, run_logged
from tests.real import corpus, report, smollm2, whisper
from tests.real.fetch import cache_folder

INTEGRATIONS = ("plits", "lal", "pal_v3")
WINDOW_S = 10  # the clips are short, and a Whisper window costs the same however little of it is audio
HEARTBEAT_S = 60.0
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Stage:
    """A part of the run: a command, or a function that returns its results."""

    name: str
    work: tuple[str, ...] | Callable[[], Any]


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock_folder(out, ".lock"):
            for stage in plan(arguments):
                run(out, stage)
    except CommandFailed as failure:
        logger.error(failure)
        return failure.exit_code
    logger.info("finished in %s: %s", format_duration(time.monotonic() - started), arguments.page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.real", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for everything but the cache")
    parser.add_argument("--page", type=Path, default=Path("pipeline/results/real.md"), help="the page to write")
    parser.add_argument("--nproc", type=int, default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="use one clip of so many, for a quick run")
    parser.add_argument("--limit", type=int, default=500, help="held-out clips to evaluate (default: %(default)s)")
    parser.add_argument("--integrations", nargs="+", default=INTEGRATIONS, choices=INTEGRATIONS)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of `smollm2_135m_real`")
    add_json(parser)
    return parser


def plan(arguments: argparse.Namespace) -> list[Stage]:
    """Returns the stages, in order."""
    out: Path = arguments.out
    models = cache_folder() / "models"
    language_model, encoder = models / "smollm2_135m_instruct", models / "whisper_base"
    manifests, train_set, test_set = out / "corpus", out / "features/train", out / "features/test"
    stages = [
        Stage("language model", partial(_converted, smollm2.convert, language_model)),
        Stage("encoder", partial(_converted, partial(whisper.convert, "base"), encoder)),
        Stage("corpus", partial(corpus.write_corpus, manifests, arguments.every)),
    ]
    for features in (train_set, test_set):
        settings = (f"manifest={manifests / features.name}.jsonl", f"output={features}", "partition_clips=100")
        weights = (f"encoders.whisper.model={encoder}", f"encoders.whisper.window_s={WINDOW_S}")
        command = ("data_prep.prepare", "whisper_base_prepare", *settings, *weights)
        stages.append(Stage(f"features {features.name}", command))
    for integration in arguments.integrations:
        settings = (
            f"model.integration={integration}",
            f"model.language_model={language_model}",
            f"data.train={train_set}",
            f"data.validation={test_set}",
            f"output={out / integration}",
            f"tracking.uri=sqlite:///{out / 'mlflow.db'}",
        )
        train = ("pipeline.train", "smollm2_135m_real", *settings, *arguments.set, f"--nproc={arguments.nproc}")
        stages.append(Stage(f"train {integration}", train))
        model = str(out / integration / "02-joint/model")
        bounds = (f"--limit={arguments.limit}", f"--max-new-tokens={MAX_NEW_TOKENS}")
        files = (f"--predictions={out / integration / 'predictions.jsonl'}",)
        controls = ("--swap-audio", f"--majority-from={train_set}")
        evaluate = ("pipeline.evaluate", model, str(test_set), *controls, *bounds, *files)
        stages.append(Stage(f"evaluate {integration}", evaluate))
        probe = ("pipeline.probe", model, str(test_set), "--questions=60", "--limit=60", "--max-new-tokens=24")
        stages.append(Stage(f"probe {integration}", probe))
    write = partial(report.write_page, out, arguments.page, tuple(arguments.integrations))
    return [*stages, Stage("page", write)]


def _converted(convert: Callable[[Path], Path], folder: Path) -> dict[str, str]:
    """Converts a model unless that was done; the folder appears when it is complete and was checked."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        convert(temporary).rename(folder)
    return {"folder": str(folder)}


def run(out: Path, stage: Stage) -> None:
    """Runs a stage unless it is finished; the page is always written."""
    stem = out / "stages" / stage.name.replace(" ", "_")
    done = stem.with_suffix(".done.json")
    if done.exists() and stage.name != "page":
        logger.info("%s: already finished", stage.name)
        return
    logger.info("%s ...", stage.name)
    started = time.monotonic()
    stem.parent.mkdir(parents=True, exist_ok=True)
    if callable(stage.work):
        results = stage.work()
    else:
        results, _ = run_logged(
            LoggedCommand(stage.name, stage.work, stem.with_suffix(".log"), stem.with_suffix(".figures.json")),
            ends_with_parent=True,
            heartbeat_s=HEARTBEAT_S,
            on_heartbeat=lambda line: logger.info("%s, %s: %s", stage.name, _since(started), line),
        )
    record = {"work": str(stage.work), "wall_s": round(time.monotonic() - started, 1), "results": results}
    atomic_write(done, json.dumps(record, indent=2).encode())
    logger.info("%s: finished in %s", stage.name, _since(started))


def _since(started: float) -> str:
    return format_duration(time.monotonic() - started)


if __name__ == "__main__":
    configure_logging()
    sys.exit(run_command(main))
