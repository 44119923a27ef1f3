"""Tests of the size of a run's data: selected tasks and mixtures, measured in sets or described in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig, ExperimentConfig, load_config
from pipeline.config.cluster import ClusterConfig, EncoderCost, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.cost.extraction import extraction
from pipeline.cost.workload import measure_workload, select_workload
from pipeline.plan import main
from tests.helpers.feature_sets import frames_of, write_rows
from tests.helpers.jobs import write_experiment


def described(**changes: Any) -> WorkloadConfig:
    workload = load_config(WorkloadConfig, "openaqa_workload")
    tasks = [
        {"tasks": ["label"], "clips": 800_000, "questions": 1_000_000, "question_tokens": 40, "answer_tokens": 10},
        {"tasks": ["caption", "story"], "clips": 500_000, "questions": 3_000_000},
    ]
    return WorkloadConfig.model_validate({**workload.model_dump(), "tasks": tasks, **changes})


def data(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "unused", **values})


def test_a_described_workload_is_that_of_the_selected_tasks() -> None:
    part = select_workload(described(), data(tasks=["label"]))
    assert (part.clips, part.questions, part.question_tokens, part.answer_tokens) == (800_000, 1_000_000, 40, 10)
    both = select_workload(described(), data(tasks=["story", "label", "caption"]))
    assert (both.clips, both.questions, both.question_tokens) == (845_000, 4_000_000, 85)
    assert select_workload(described(), data()) == described()


def test_a_described_workload_counts_the_mixture() -> None:
    mixed = data(tasks=["label"], mixture=[{"tasks": ["caption", "story"], "share": 0.2}])
    part = select_workload(described(), mixed)
    assert part.questions == 1_250_000  # 1,000,000 are four fifths
    assert (part.question_tokens, part.answer_tokens) == (round(0.8 * 40 + 0.2 * 100), round(0.8 * 10 + 0.2 * 20))


@pytest.mark.parametrize(
    ("selection", "fault"),
    [
        ({"tasks": ["caption"]}, "selects a part of caption, story"),
        ({"tasks": ["music"]}, "'music' is not in the workload"),
        ({"datasets": ["as"]}, "selects datasets"),
        ({"mixture": [{"tasks": ["music"], "share": 0.5}]}, "data.mixture.0.tasks: 'music'"),
    ],
)
def test_what_a_workload_does_not_describe_is_refused(selection: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        select_workload(described(), data(**selection))


def test_a_measured_workload_is_that_of_the_selected_questions(tmp_path: Path) -> None:
    """The first question of each clip is of another task than the second, with a longer answer."""
    config = load_config(ExperimentConfig, write_experiment(tmp_path))
    rows = [
        {
            "clip_id": f"{clip}",
            "duration_s": 1.0 + clip,
            "dataset": "d",
            "domain": "sound",
            "questions": [
                {"question_id": f"{clip}/0", "question": "What?", "answer": "yes", "task": "short"},
                {"question_id": f"{clip}/1", "question": "What?", "answer": "a long answer", "task": "long"},
            ],
        }
        for clip in range(6)
    ]
    write_rows(tmp_path / "tasks", rows, {"log_mel": [frames_of(clip, 8) for clip in range(6)]})

    def measure(**selection: Any) -> WorkloadConfig:
        values = {**config.data.model_dump(), "train": str(tmp_path / "tasks"), **selection}
        return measure_workload(config.model_copy(update={"data": DataConfig.model_validate(values)}))

    short, long = measure(tasks=["short"]), measure(tasks=["long"])
    assert (short.questions, long.questions) == (6, 6)
    assert long.answer_tokens > short.answer_tokens + 2
    mixed = measure(tasks=["short"], mixture=[{"tasks": ["long"], "share": 0.5}])
    assert mixed.questions == 12
    assert mixed.answer_tokens == round((short.answer_tokens + long.answer_tokens) / 2)


def test_preparation_counts_whole_windows_and_does_not_guess() -> None:
    cluster = load_config(ClusterConfig, "a100_80")
    whisper = EncoderCost(frame_rate_hz=50, width=1280, window_s=30, gflop_per_encoded_s=73)
    short = described(clip_s=1, encoders={"whisper": whisper})
    assert extraction(cluster, short, ["whisper"]).padding == {"whisper": 30}
    full = described(clip_s=30, encoders={"whisper": whisper})
    hours = [extraction(cluster, workload, ["whisper"]).encoder_hours for workload in (short, full)]
    assert hours[0] == hours[1]
    unknown = described(encoders={"whisper": whisper.model_copy(update={"gflop_per_encoded_s": None})})
    assert extraction(cluster, unknown, ["whisper"]).hours is None


def test_a_plan_reports_padding_and_reads_overrides_after_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["llama_3_2_1b", "--workload", "openaqa_workload", "--stage", "connector", "output=unused"]
    assert main([*arguments, "model.integration=plits"]) == 0
    printed = capsys.readouterr().out
    assert "whisper encodes 3 s for each second of audio" in printed
    assert ", plits: " in printed
