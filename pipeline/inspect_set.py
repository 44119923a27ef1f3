"""`pal inspect SET|CONFIG`: shows the clips and conversations of a feature set as they are stored, or, of a training
config, as the model gets them: the rendered text, the place of the audio, and which tokens carry loss.

Everything is read through the classes that training reads through: `FeatureSet`, `TrainingLoader`, `ChatTemplate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.core.arguments import require_positive, write_results
from pipeline.core.errors import UserError, run_command
from pipeline.core.transcript import Style, stdout_style

if TYPE_CHECKING:  # torch and streaming take seconds to import, which `--help` must not
    from pipeline.data.inspection import StoredSet
    from pipeline.training.inspection import TrainingData

_SHOWN = 3
_MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")


class Entry(Protocol):
    """A block on the console: a clip of a set, or a sequence of a training."""

    def rows(self) -> list[dict[str, Any]]: ...

    def text(self, style: Style) -> str: ...


class Source(Protocol):
    """A feature set, or the data of a training."""

    unit: str

    def summary(self, style: Style) -> str: ...

    def entries(self, clip_id: str | None) -> tuple[int, Iterator[Entry]]: ...


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    require_positive(arguments, "number")
    is_set = "://" in arguments.source or Path(arguments.source).is_dir()
    source: Source = _open_set(arguments) if is_set else _open_training_data(arguments)
    style = stdout_style()
    print(source.summary(style))
    total, entries = source.entries(arguments.clip)
    shown = min(total, arguments.number or (_SHOWN if arguments.clip is None else total))
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        if number < shown:
            print(f"\n{entry.text(style)}")
        elif arguments.json is None:
            break
        if arguments.json is not None:
            rows += entry.rows()
    if shown < total:
        print(f"\n{shown:,} of {total:,} {source.unit}; --number N shows more, --clip ID those of one clip")
    write_results({"rows": rows}, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal inspect",
        description="Show the clips and conversations of a feature set as they are stored; or, of a training config, "
        "as the model gets them: the rendered text, the place of the audio, and which tokens carry loss.",
    )
    parser.add_argument(
        "source", metavar="SET|CONFIG", help="a prepared feature set; or the YAML file of a training, or a shipped name"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")
    parser.add_argument("--clip", metavar="ID", help="show only this clip")
    parser.add_argument(
        "--number", type=int, metavar="N", help="clips or sequences to show (default: 3; with --clip, all of the clip)"
    )
    parser.add_argument(
        "--epoch", type=int, metavar="E", help="of a config: show the sequences of this epoch, from 0, in their order"
    )
    parser.add_argument("--stage", metavar="NAME", help="of a config with several stages: show the data of this one")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of a remote set: folder for local copies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all questions to this file, not only N")
    return parser


def _open_set(arguments: argparse.Namespace) -> StoredSet:
    """Opens a feature set with all its encoders.

    Raises:
        UserError: an option applies to configs only; or see `FeatureSet`.
    """
    from pipeline.core.feature_contract import load_contract
    from pipeline.data.feature_set import FeatureSet
    from pipeline.data.inspection import StoredSet

    for name in ("overrides", "stage", "epoch"):
        if getattr(arguments, name) not in (None, []):
            where = arguments.overrides[0] if name == "overrides" else f"--{name}"
            raise UserError(where, "applies to a training config, not to a feature set", "leave it out")
    if "://" in arguments.source and arguments.cache is None:
        raise UserError(arguments.source, "is in an object store", "give --cache a folder on a local disk")
    return StoredSet(FeatureSet(arguments.source, list(load_contract(arguments.source).encoders), arguments.cache))


def _open_training_data(arguments: argparse.Namespace) -> TrainingData:
    """Opens the training data of a config.

    Raises:
        UserError: an option does not apply, the config has several stages, or the data does not fit the config.
    """
    from pipeline.config import ExperimentConfig, choose_stages, load_config
    from pipeline.training.inspection import TrainingData

    if arguments.cache is not None:
        raise UserError("--cache", "applies to a feature set, not to a config", "set data.cache")
    if arguments.epoch is not None and arguments.epoch < 0:
        raise UserError("--epoch", f"{arguments.epoch} is below 0", "the first epoch is 0")
    _refuse_preparation(arguments.source)
    stages = choose_stages(load_config(ExperimentConfig, arguments.source, arguments.overrides), arguments.stage)
    if len(stages) > 1:
        raise UserError(arguments.source, f"has the stages {', '.join(stages)}", "choose one with --stage NAME")
    return TrainingData(next(iter(stages.values())), arguments.epoch)


def _refuse_preparation(path: str) -> None:
    """Raises a `UserError` about a file that configures a preparation, or is no config at all."""
    from pipeline.config.loading import read_yaml, shipped_config

    if Path(path).suffix.lower() in _MANIFESTS:
        raise UserError(path, "is not a prepared feature set", "prepare it with `pal prepare`, and give its output")
    values = read_yaml(shipped_config(path))
    if "manifest" in values and "data" not in values:
        remedy = f"give the feature set that it makes: pal inspect {values.get('output', 'SET')}"
        raise UserError(path, "configures a preparation, not a training", remedy)


if __name__ == "__main__":
    sys.exit(run_command(main))
