"""Command-line arguments that several commands share, and the file that a command writes its results to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


def add_config(parser: argparse.ArgumentParser, name: str = "config", *, optional: bool = False) -> None:
    """Adds CONFIG and any number of `key.sub=value` overrides (parse with `parse_intermixed_args`)."""
    parser.add_argument(
        name, nargs="?" if optional else None, help="a YAML file, or the name of a config that ships with the software"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config overrides")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`, for `write_results`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")


def add_dry_run(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--dry-run`.

    Args:
        what: what the command then does instead of its work, as an imperative ("check the config and print ...").
    """
    parser.add_argument("--dry-run", action="store_true", help=what)


def write_results(results: Mapping[str, Any], file: Path | None) -> None:
    """Writes the results of a command as JSON; does nothing without a file."""
    if file is not None:
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_encoder_option(parser: argparse.ArgumentParser) -> None:
    """Adds a repeatable `--encoder NAME=FOLDER`; `arguments.encoder` holds pairs of name and folder."""
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        type=_encoder_location,
        metavar="NAME=FOLDER",
        help="folder of an encoder's weights, if they have moved since preparation",
    )


def _encoder_location(text: str) -> tuple[str, str]:
    name, _, location = text.partition("=")
    if not name or not location:
        raise UserError("--encoder", f"'{text}' is not NAME=FOLDER", "name an encoder of the model and a folder")
    return name, location


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Checks that options which are counts are at least 1, if the user gave them.

    Raises:
        UserError: an option is below 1.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"{value} is below 1", "give a positive number")
