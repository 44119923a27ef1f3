"""`pal bench train`: what a dry run prints, and the figures of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench import train
from tests.helpers.jobs import write_experiment


def test_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--dry-run", "--steps", "7", "--nproc", "2"]) == 0
    assert capsys.readouterr().out == "7 steps of demo on 2 ranks, and twice as many of the bare engine\n"


@pytest.mark.slow
def test_the_loop_is_compared_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)
    config, file = write_experiment(tmp_path), tmp_path / "figures.json"
    assert train.main([str(config), "--steps", "4", "--nproc", "2", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["ratio"] == pytest.approx(figures["loop_steps_per_s"] / figures["engine_steps_per_s"])
    assert 0 < figures["ratio"] < 3 and 0 <= figures["data_wait_fraction"] < 1
    assert not (tmp_path / "run").exists()  # it leaves nothing in the output folder of the config
