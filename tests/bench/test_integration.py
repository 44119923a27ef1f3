"""`pal bench integration`: the keys that others read, the ratios of the rows, and the parts of the memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.bench import integration
from pipeline.bench.case import SHAPES, Case, Shape, make_batch, model_config
from pipeline.core.errors import UserError
from pipeline.model import PalForCausalLM
from pipeline.plots import plot_cost

TINY = Shape(layers=3, hidden=16, ffn=24, heads=4, kv_heads=2, vocabulary=40)
CASE = Case(
    variant="plits", mode="train", shape=TINY, num_audio_tokens=7, num_text_tokens=6, answer_tokens=2,
    questions_per_clip=3, batch=2, feature_width=5, device="cpu", dtype="fp32", steps=1,
)  # fmt: skip
KEYS = {"variant", "mode", "num_audio_tokens", "num_text_tokens", "questions_per_clip", "batch", "layers", "hidden",
        "samples_per_s", "peak_memory_gib", "flops_per_sample"}  # fmt: skip


@pytest.mark.parametrize("variant", integration.VARIANTS)
def test_a_training_batch_has_loss_on_every_answer_and_nothing_else(variant: str) -> None:
    case = replace(CASE, variant=variant)
    batch = make_batch(case)
    assert int((batch["labels"] != -100).sum()) == case.batch * case.questions_per_clip * case.answer_tokens
    model = PalForCausalLM(model_config(case))
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", integration.VARIANTS)
def test_a_decoding_batch_leaves_out_the_answers_and_the_model_generates_them(variant: str) -> None:
    case = replace(CASE, variant=variant, mode="decode", questions_per_clip=1)
    batch = make_batch(case)
    assert batch["input_ids"].shape == (2, 4 if variant == "text_only" else 5)
    answers = PalForCausalLM(model_config(case)).generate(**batch, do_sample=False, max_new_tokens=2)
    assert answers.shape == (2, 2)


def test_counted_operations_put_the_integrations_in_the_order_of_the_method() -> None:
    case = replace(
        CASE, shape=SHAPES["llama-3.2-1b"], num_audio_tokens=512, num_text_tokens=100, answer_tokens=20,
        questions_per_clip=1, feature_width=768,
    )  # fmt: skip
    rows = [
        integration.describe(replace(case, variant=v, questions_per_clip=q))
        for v in integration.VARIANTS
        for q in (1, 6)
    ]
    integration.add_ratios(rows)
    ratio = {(r["variant"], r["questions_per_clip"]): r["flop_ratio"] for r in rows}
    assert ratio["plits", 1] == 1
    assert ratio["text_only", 1] == ratio["text_only", 6]
    for questions in (1, 6):
        order = [ratio[v, questions] for v in ("plits", "pal_v2", "pal_v3", "lal", "text_only")]
        assert order == sorted(order)
    assert 3.4 < ratio["lal", 1] < 3.8
    assert 5.0 < ratio["lal", 6] < 5.6


def test_every_measurement_has_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training holds parameters, gradients and two moments, sixteen bytes a parameter, and activations."""
    sizes = "--layers 2 --hidden 512 --ffn 1024 --heads 4 --kv-heads 2 --vocabulary 4000 --text-tokens 8"
    what = "--answer-tokens 2 --audio-tokens 9 --questions 2 --batch 1 --variants text_only --modes train --steps 1"
    file = tmp_path / "bench.json"
    assert integration.main([*sizes.split(), *what.split(), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    (row,) = figures["rows"]
    assert row.keys() >= KEYS
    assert figures.keys() >= {"device", "torch"}
    assert row["samples_per_s"] == pytest.approx(2 / row["step_s"])
    case = replace(CASE, variant="text_only", shape=Shape(2, 512, 1024, 4, 2, 4000))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PalForCausalLM(model_config(case)).parameters())
    assert 16 * parameters < row["peak_memory_gib"] * 2**30 < 24 * parameters
    assert "text_only" in capsys.readouterr().out


def test_a_dry_run_measures_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "measure", None)
    assert integration.main(["--dry-run"]) == 0
    assert "Llama-3.2-1B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--text-tokens 5 --answer-tokens 5", "--answer-tokens"),
        ("--heads 3", "--heads"),
        ("--batch 0", "--batch"),
        ("--audio-tokens 1", "--audio-tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        integration.main([*arguments.split(), "--dry-run"])


def test_the_plot_shows_every_variant_even_if_one_did_not_fit(tmp_path: Path) -> None:
    rows = [
        {"variant": v, "num_audio_tokens": n, "samples_per_s": None if (v, n) == ("plits", 256) else 100 / n,
         "flops_per_sample": 1e9 * n}
        for v in ("plits", "lal") for n in (64, 128, 256)
    ]  # fmt: skip
    figure = plot_cost(rows, "cost")
    measured, counted = figure.axes
    assert [len(line.get_xdata()) for line in measured.get_lines()] == [2, 3]
    assert [len(line.get_xdata()) for line in counted.get_lines()] == [3, 3]
    figure.savefig(tmp_path / "cost.png")
