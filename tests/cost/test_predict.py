"""A plan's numbers agree with DeepSpeed's estimators, with what autograd saves, and with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench.plan import PlannedRun
from pipeline.bench.planned_runs import WORKLOAD, make_batch, write_config
from pipeline.config import ExperimentConfig, TrainConfig, load_config, validate_config
from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.core.errors import UserError
from pipeline.cost.activations import Execution, activation_bytes
from pipeline.cost.memory import zero_memory
from pipeline.cost.predict import predict
from pipeline.cost.search import cheapest, explain_alternatives, search
from pipeline.cost.workload import model_size, row_shape, run_flops, total_steps
from pipeline.engine import build_ds_config
from pipeline.model import PalForCausalLM, set_trainable
from pipeline.plan import main

GROUPS = [[2048 * 8192] * 30, [2048] * 60]  # about half a billion trained
TRAINED = sum(map(sum, GROUPS))


def openaqa(**overrides: Any) -> ExperimentConfig:
    values: dict[str, Any] = {
        "output": "unused",
        "model": {"language_model": "llama-3.2-1b", "integration": "plits", "encoders": ["sslam"]},
        "data": {"train": "unused"},
        "train": {"epochs": 1, "global_batch_size": 256, "micro_batch_size": 8},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        values[section][name] = value
    return validate_config(ExperimentConfig, values, "a test")


def cluster(name: str = "a100_80", **changes: Any) -> ClusterConfig:
    return load_config(ClusterConfig, name, [f"{key}={value}" for key, value in changes.items()])


def planned_states(policy: str, world_size: int) -> Any:
    train = TrainConfig(steps=1)
    ds_config = build_ds_config(policy, train, world_size=world_size, accumulation=1, on_gpu=True)
    return zero_memory(ds_config, GROUPS, [], world_size=world_size, on_gpu=True)


@pytest.mark.parametrize("gpus", [8, 64])
def test_states_agree_with_the_estimators_of_deepspeed(gpus: int) -> None:
    """The estimator of stage 2 also counts half-precision gradients of the rank's partition, which pass buckets."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    nodes = gpus // 8
    passing = 2 * TRAINED / gpus
    two = planned_states("zero2", gpus)
    _, expected = estimate_zero2_model_states_mem_needs(TRAINED, 8, nodes, cpu_offload=False)
    assert two.parameters + two.gradients + two.optimizer + passing == pytest.approx(expected, rel=1e-3)
    three = planned_states("zero3", gpus)
    _, expected, largest = estimate_zero3_model_states_mem_needs(TRAINED, 0, 8, nodes, False, False)
    replicated = 2 * sum(GROUPS[1]) * (1 - 1 / gpus)  # below the persistence threshold
    states = three.parameters - replicated + three.gradients + three.optimizer
    assert states == pytest.approx(expected - largest, rel=1e-3)
    offloaded = planned_states("zero2_offload", gpus)
    _, expected = estimate_zero2_model_states_mem_needs(TRAINED, 8, nodes, cpu_offload=True)
    assert offloaded.parameters == pytest.approx(expected, rel=1e-3) and not offloaded.optimizer


@pytest.mark.parametrize("integration", ["plits", "lal", "pal_v3", "flamingo"])
@pytest.mark.parametrize("trainable", ["all", "all_but_ffn", "connector"])
@pytest.mark.parametrize("questions", [1, 3])
def test_counted_activations_are_those_that_autograd_saves(
    integration: str, trainable: Any, questions: int, tmp_path: Path
) -> None:
    run = PlannedRun("wide", integration, zero_stage=0)
    config = write_config(tmp_path, run, questions=questions, trainable=trainable, micro_batch_size=2)
    size = model_size(config, WORKLOAD)
    model = PalForCausalLM(size.config)
    set_trainable(model, trainable)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(**make_batch(config)).loss
    log_probabilities = 4 * 2 * WORKLOAD.answer_tokens * questions * 2000
    execution = Execution(element_bytes=4, trainable=trainable, on_gpu=False)
    counted = activation_bytes(size.config, row_shape(config, WORKLOAD), execution)
    assert 2 * counted.saved == pytest.approx(sum(saved.values()) - log_probabilities, rel=0.08)
    assert loss.isfinite()


def test_an_epoch_of_openaqa_takes_the_hours_of_its_operations() -> None:
    """Llama-3.2-1B, N_a 512, N_t 100, eight A100 at 45 % of their peak."""
    workload, hours = load_config(WorkloadConfig, "openaqa_workload"), {}
    for integration, questions, expected in (("plits", 1, 5.2), ("lal", 1, 1.4), ("lal", 8, 1.0), ("pal_v3", 1, 2.5)):
        config = openaqa(model__integration=integration, data__questions_per_sequence=questions)
        hours[integration, questions] = run_flops(config, workload) / (8 * 312e12 * 0.45) / 3600
        assert hours[integration, questions] == pytest.approx(expected, rel=0.06)
    prediction = predict(openaqa(), cluster(), workload)
    whole = total_steps(openaqa(), workload) * prediction.step_s / 3600
    assert hours["plits", 1] < whole < 1.5 * hours["plits", 1]


def test_the_search_chooses_the_fastest_that_fits_and_explains_the_others() -> None:
    config = openaqa(model__language_model="meta-llama/Llama-3.1-8B-Instruct", train__global_batch_size=512)
    predictions = search(config, cluster(), load_config(WorkloadConfig, "openaqa_workload"))
    best = cheapest(predictions)
    assert best is not None and best.memory_gib["total"] < 80 * 0.92
    assert all(p.step_s >= best.step_s for p in predictions if not p.does_not_fit)
    lines = explain_alternatives(predictions)
    assert len(lines) == 12 and sum("the cheapest" in line for line in lines) == 1
    assert any(line.startswith("zero0: micro-batch 1 needs") and "optimizer" in line for line in lines)


def test_of_equally_fast_ways_the_search_chooses_the_one_that_recomputes_less() -> None:
    config = openaqa(model__language_model="llama-3.1-70b", model__integration="lal", train__global_batch_size=1024)
    slow = cluster(nodes=128, between_nodes_gb_s=20)  # the collectives of stage 3 take longer than all else
    predictions = search(config, slow, load_config(WorkloadConfig, "openaqa_workload"), ["zero3"])
    plain, saving = predictions
    assert plain.step_s == saving.step_s and cheapest(predictions) is plain


def test_partitioning_and_checkpointing_save_memory() -> None:
    workload = load_config(WorkloadConfig, "openaqa_workload")
    ways = [predict(openaqa(train__zero=z), cluster(), workload) for z in ("zero0", "zero2", "zero2_offload")]
    totals = [prediction.memory_gib["total"] for prediction in ways]
    assert totals == sorted(totals, reverse=True)
    plain, saving = (predict(openaqa(train__gradient_checkpointing=c), cluster(), workload) for c in (False, True))
    assert saving.memory_gib["activations"] < plain.memory_gib["activations"] / 3
    assert saving.step_s > plain.step_s and saving.mfu < plain.mfu


def test_a_frozen_language_model_costs_less(tmp_path: Path) -> None:
    workload = load_config(WorkloadConfig, "openaqa_workload")
    everything, connector = (
        predict(openaqa(train__trainable=t, model__integration="lal"), cluster(), workload)
        for t in ("all", "connector")
    )
    assert connector.memory_gib["optimizer"] < everything.memory_gib["optimizer"] / 2
    assert connector.seconds["products"] < everything.seconds["products"]


def test_more_nodes_are_faster_but_less_efficient() -> None:
    workload = load_config(WorkloadConfig, "openaqa_workload")
    one, many = (predict(openaqa(), cluster(nodes=nodes), workload) for nodes in (1, 4))
    assert many.step_s < one.step_s and many.mfu < one.mfu


def test_the_command_writes_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, results = tmp_path / "config.yaml", tmp_path / "plan.json"
    file.write_text(json.dumps(openaqa().model_dump(mode="json")))
    assert main([str(file), "--workload", "openaqa_workload", "--json", str(results)]) == 0
    figures = json.loads(results.read_text())
    assert figures.keys() >= {"memory_gib_per_gpu", "step_time_s", "mfu", "tokens_per_s", "days", "fits"}
    parts = {"parameters", "gradients", "optimizer", "activations", "audio", "total"}
    assert figures["memory_gib_per_gpu"].keys() >= parts and figures["fits"]
    assert figures["extraction"]["storage_gib"] == pytest.approx(620, rel=0.02)
    assert "cheapest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "gpus", "fault"),
    [
        ({"train__global_batch_size": 12}, 8, "are not divisible"),
        ({"model__encoders": ["beats"]}, 8, "'beats' is not in the workload"),
        ({"model__language_model": "/no/such/model"}, 8, "cannot be read"),
    ],
)
def test_mistakes_are_reported(changes: dict[str, Any], gpus: int, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        search(openaqa(**changes), cluster(), load_config(WorkloadConfig, "openaqa_workload"))
