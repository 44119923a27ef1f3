"""Loss by task and FLOPs of a step, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.core.streams import Preset
from pipeline.cost.flops import RowShape, training_flops
from pipeline.training.step_metrics import TaskLosses, step_flops
from pipeline.training.throughput import peak_flops
from tests.helpers.small_models import AUDIO_TOKEN, PRESETS, WIDTHS, build

A = AUDIO_TOKEN
# Two packed questions about a clip; one question about another; one about none.
ROWS = [[5, A, 7, 8, 9, 10, 11, 12, 13], [14, 15, A, 16, 17, 18], [19, 20, 21, 22]]
SEGMENTS = [[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 6, [0] * 4]
LABELLED = [[4, 7, 8], [4, 5], [3]]
QUESTION_OF_LABEL = [0, 1, 1, 2, 2, 3]
TASKS_OF_QUESTIONS = ["what?", "count", "what?", "chat"]
FRAMES = [6, 4]


def mixed_batch() -> dict[str, Any]:
    ids, mask, segments = (torch.zeros(3, 9, dtype=torch.long) for _ in range(3))
    labels = torch.full((3, 9), -100)
    for row, tokens in enumerate(ROWS):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        segments[row, : len(tokens)] = torch.tensor(SEGMENTS[row])
        labels[row, LABELLED[row]] = ids[row, LABELLED[row]]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "segment_ids": segments,
        "audio_features": {name: torch.randn(sum(FRAMES), width) for name, width in WIDTHS.items()},
        "audio_lengths": {name: torch.tensor(FRAMES) for name in WIDTHS},
        "tasks": TASKS_OF_QUESTIONS,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_tokens_are_summed_by_task(preset: Preset) -> None:
    batch = mixed_batch()
    inputs = {name: value for name, value in batch.items() if name != "tasks"}
    output = build(preset)(**inputs)
    losses, tokens = output.token_losses, output.target_tokens
    assert float(losses.sum() / len(losses)) == pytest.approx(output.loss.item(), rel=1e-6)
    index = {(row, column): n for n, (row, column) in enumerate((r, c) for r in range(3) for c in LABELLED[r])}
    question = [QUESTION_OF_LABEL[index[divmod(token, 9)]] for token in tokens.tolist()]
    assert sorted(question) == QUESTION_OF_LABEL  # every label is a target once

    tasks = ["chat", "count", "sing", "what?"]
    task_losses = TaskLosses(tasks)
    for _ in range(2):
        task_losses.add(batch, losses, tokens)
    expected = {task: [float(x) for x, q in zip(losses, question, strict=True) if TASKS_OF_QUESTIONS[q] == task]
                for task in tasks}  # fmt: skip
    assert task_losses.metrics([*task_losses.to_list(), 7.0]) == {
        f"loss/{task.replace('?', '_')}": pytest.approx(sum(values) / len(values))
        for task, values in expected.items()
        if values
    }


def test_the_flops_of_a_step_are_those_of_its_rows() -> None:
    config, batch = build("pal_v3").config, mixed_batch()
    rows = [
        RowShape(1, [3, 4], 3, {"one": 6, "two": 6}),
        RowShape(2, [3], 2, {"one": 4, "two": 4}),
        RowShape(0, [4], 1, {}),
    ]
    for trainable in ("connector", "all"):
        expected = sum(training_flops(config, row, trainable) for row in rows)
        assert step_flops(config, [batch, batch], trainable) == 2 * expected


def test_the_peak_of_an_unknown_device_is_not_invented() -> None:
    assert peak_flops(torch.device("cpu"), "bf16", None) is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.25) == 0.25e12


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_a_device_is_recognized_by_whole_words(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(torch.device("cuda"), "bf16", None) == expected
    assert peak_flops(torch.device("cuda"), "fp32", None) is None
