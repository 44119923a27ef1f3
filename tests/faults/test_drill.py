"""The drill itself, on a run small enough for a test: every fault is met, told and survived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import drill
from pipeline.core.errors import UserError
from tests.helpers.jobs import write_experiment


def test_the_table_says_who_did_not_recover() -> None:
    rows = [drill.Outcome("a full disk", "told", 0, True), drill.Outcome("rank 1 killed", "named", 7, False)]
    lines = drill.table(rows).splitlines()
    assert lines[0].split() == ["fault", "what", "happened", "steps", "lost", "recovered"]
    assert lines[1].split()[-2:] == ["0", "yes"] and lines[2].split()[-2:] == ["7", "NO"]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        drill.main(["--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_every_fault(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, steps=400)
    out = tmp_path / "drill"
    assert drill.main([str(config), "--out", str(out), "--json", str(tmp_path / "drill.json")]) == 0
    faults = {row["fault"]: row for row in json.loads((tmp_path / "drill.json").read_text())["faults"]}
    assert len(faults) == 13 and all(row["recovered"] for row in faults.values())
    assert faults["SIGUSR1"]["steps_lost"] == 0 < faults["a flipped bit in the newest checkpoint"]["steps_lost"]
