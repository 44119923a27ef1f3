"""`pal bench plan`: one run is predicted and measured on ranks of its own, and the page shows errors and ratios."""

from __future__ import annotations

import pytest

from pipeline.bench import plan
from pipeline.core.errors import UserError


def test_the_page_has_a_row_for_every_run_with_step_times_over_their_mean() -> None:
    comparisons = [
        {"parameters": (11.0, 10.0), "step_s": (2.0 * factor, 3.0 * factor)}
        for factor in (0.5, 2.0, *[1.0] * (len(plan.RUNS) - 2))
    ]
    lines = plan.page(comparisons, 8, 0.25).splitlines()
    rows = [line for line in lines if line.startswith(("| wide", "| small"))]
    assert len(rows) == len(plan.RUNS)
    assert rows[0] == "| wide plits 0 1 1 fp32 | 11.00 / 10.00 (+10.0%) | 0.50 / 0.50 (+0.0%) |"
    assert any("load average): 0.2" in line for line in lines)


def test_without_timed_steps_the_page_says_so() -> None:
    page = plan.page([{"parameters": (1.0, 1.0)}] * len(plan.RUNS), 0, 1.0)
    assert "were not measured" in page and "of the mean" not in page


def test_a_run_is_measured_on_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    comparison = plan.compare(plan.PlannedRun("small", "lal", 1, ranks=2), steps=1)
    assert comparison.keys() == {*plan.STATES, "total", "step_s"}
    for part in plan.STATES:
        predicted, measured = comparison[part]
        assert predicted == pytest.approx(measured, rel=0.02), part
    assert comparison["step_s"][1] > 0


def test_a_dry_run_prints_the_runs_and_writes_nothing(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(tmp_path / "plan.md"), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(plan.RUNS)
    assert not list(tmp_path.iterdir())


def test_a_negative_number_of_steps_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="--steps"):
        plan.main([str(tmp_path / "plan.md"), "--steps", "-1"])
