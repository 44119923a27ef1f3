"""`pal drill`: injects faults into a real training run on this machine and reports how the run recovers.

The faults are test code: `tests/faults/scenarios.py` of the source checkout, which an installed wheel does not contain.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.arguments import add_config, add_json, write_results
from pipeline.core.console import format_duration, format_table, logger
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from pipeline.core.ranks import ACCELERATOR_VARIABLE
from pipeline.launch.subprocesses import CommandFailed, make_small_experiment

CLIPS = 60
CHECKOUT = Path(__file__).parents[1]
SCENARIOS = "tests.faults.scenarios"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    scenarios = _load_scenarios()
    out: Path = arguments.out.absolute()
    if out.exists():
        raise UserError(out, "exists", "remove it, or give another --out")
    out.mkdir(parents=True)
    config, overrides = arguments.config, arguments.overrides
    started = time.monotonic()
    try:
        if config is None:
            config = "drill"
            os.environ[ACCELERATOR_VARIABLE] = "cpu"  # so that two ranks run on any machine
            overrides = [*make_small_experiment(out, CLIPS, "drill_language_model"), *overrides]
        outcomes = scenarios.run(config, overrides, out)
    except (CommandFailed, scenarios.DrillFailed) as failure:
        logger.error(failure)
        return EXIT_FAILURE
    wall_s = time.monotonic() - started
    write_results({"faults": [asdict(outcome) for outcome in outcomes], "wall_s": round(wall_s, 1)}, arguments.json)
    print(f"{table(outcomes)}\n\n{format_duration(wall_s)}; logs of all jobs: {out}/*.log")
    return 0 if all(outcome.recovered for outcome in outcomes) else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal drill",
        description="Inject faults into a real training run on this machine and report how it recovers: lost and hung "
        "ranks, a damaged checkpoint, a full disk and others. Needs a source checkout. CONFIG is the experiment to "
        "run (default: a small one, made for the drill).",
    )
    add_config(parser, optional=True)
    parser.add_argument("--out", type=Path, default=Path("runs/drill"), help="a new folder (default: %(default)s)")
    add_json(parser)
    return parser


def _load_scenarios() -> Any:
    """Loads the one module of the tests that a command uses.

    Raises:
        UserError: there is none beside the package, as in an installed wheel.
    """
    if not (CHECKOUT / f"{SCENARIOS.replace('.', '/')}.py").is_file():
        raise UserError("pal drill", "its fault scenarios are not installed", "run it from a source checkout")
    sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(SCENARIOS)


def table(outcomes: Sequence[Any]) -> str:
    """Returns the outcomes as a table for a terminal."""
    rows = [("fault", "what happened", "steps lost", "recovered")]
    rows += [(o.fault, o.happened, str(o.steps_lost), "yes" if o.recovered else "NO") for o in outcomes]
    return format_table(rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
