"""`pal drill`: on a run small enough for a test, every fault is reported and survived."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import drill
from pipeline.core.errors import EXIT_USER_ERROR, UserError
from tests.faults.scenarios import Outcome
from tests.helpers.jobs import write_experiment


def test_the_table_shows_which_fault_was_not_survived() -> None:
    rows = [Outcome("a full disk", "reported", 0, True), Outcome("rank 1 killed", "named", 7, False)]
    lines = drill.table(rows).splitlines()
    assert lines[0].split() == ["fault", "what", "happened", "steps", "lost", "recovered"]
    assert lines[1].split()[-2:] == ["0", "yes"] and lines[2].split()[-2:] == ["7", "NO"]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        drill.main(["--out", str(tmp_path)])


def test_without_a_source_checkout_it_ends_with_one_line(tmp_path: Path) -> None:
    """The package is copied alone, as a wheel installs it."""
    package = tmp_path / "site-packages" / "pipeline"
    package.parent.mkdir()
    package.symlink_to(Path(drill.__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); from pipeline import drill; "
        "sys.exit(drill.run_command(drill.main, ['--out', 'drill']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr == "pal: pal drill: its fault scenarios are not installed; run it from a source checkout\n"
    assert not (tmp_path / "drill").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_every_fault(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, steps=400)
    out = tmp_path / "drill"
    assert drill.main([str(config), "--out", str(out), "--json", str(tmp_path / "drill.json")]) == 0
    faults = {row["fault"]: row for row in json.loads((tmp_path / "drill.json").read_text())["faults"]}
    assert len(faults) == 13 and all(row["recovered"] for row in faults.values())
    assert faults["SIGUSR1"]["steps_lost"] == 0 < faults["a flipped bit in the newest checkpoint"]["steps_lost"]
