"""Arguments that commands share, and the figures they write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pipeline.core.arguments import (
    add_config,
    add_dry_run,
    add_encoder_option,
    add_json,
    require_positive,
    write_results,
)
from pipeline.core.errors import UserError


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="pal test")


def test_overrides_may_stand_between_options() -> None:
    command = parser()
    add_config(command)
    add_json(command)
    add_dry_run(command, "print the config")
    arguments = command.parse_intermixed_args(["demo", "a=1", "--json", "out.json", "b.c=2", "--dry-run"])
    assert (arguments.config, arguments.overrides) == ("demo", ["a=1", "b.c=2"])
    assert (arguments.json, arguments.dry_run) == (Path("out.json"), True)


def test_a_config_is_required_unless_it_is_optional(capsys: pytest.CaptureFixture[str]) -> None:
    optional = parser()
    add_config(optional, optional=True)
    assert optional.parse_intermixed_args([]).config is None
    required = parser()
    add_config(required)
    with pytest.raises(SystemExit) as exit_:
        required.parse_intermixed_args([])
    assert exit_.value.code == 2
    assert "config" in capsys.readouterr().err


def test_figures_are_json_and_need_a_file(tmp_path: Path) -> None:
    write_results({"accuracy": 0.5}, None)
    assert not list(tmp_path.iterdir())
    write_results({"accuracy": 0.5, "unit": "±"}, tmp_path / "figures.json")
    text = (tmp_path / "figures.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"accuracy": 0.5, "unit": "±"} and "±" in text


def test_encoders_are_pairs_of_name_and_folder() -> None:
    command = parser()
    add_encoder_option(command)
    assert command.parse_args([]).encoder == []
    arguments = command.parse_args(["--encoder", "clap=/a=b", "--encoder", "whisper=w"])
    assert arguments.encoder == [("clap", "/a=b"), ("whisper", "w")]
    for malformed in ("clap", "=folder", "clap="):
        with pytest.raises(UserError, match=f"'{malformed}' is not NAME=FOLDER"):
            command.parse_args(["--encoder", malformed])


def test_counts_must_be_positive_where_they_are_given() -> None:
    require_positive(argparse.Namespace(batch_size=None, steps=1), "batch_size", "steps")
    with pytest.raises(UserError, match="--batch-size: 0 is below 1"):
        require_positive(argparse.Namespace(batch_size=0), "batch_size")
