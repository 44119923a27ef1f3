"""Command-line options that several commands share."""

from __future__ import annotations

import argparse

from pipeline.core.errors import UserError


def add_encoder_option(parser: argparse.ArgumentParser) -> None:
    """`--encoder NAME=FOLDER`, any number of times; pairs of name and place in `arguments.encoder`."""
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        type=_encoder_place,
        metavar="NAME=FOLDER",
        help="where an encoder's weights are, if not where they were in preparation",
    )


def _encoder_place(text: str) -> tuple[str, str]:
    name, _, place = text.partition("=")
    if not name or not place:
        raise UserError("--encoder", f"'{text}' is not NAME=FOLDER", "name an encoder of the model and a folder")
    return name, place


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Checks options that are counts, where they are given.

    Raises:
        UserError: one is below 1.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"{value} is below 1", "give a positive number")
