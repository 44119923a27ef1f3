"""Small runs on CPU ranks, and what they truly held and took, for the planner's predictions to be held against."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from pipeline.config import ExperimentConfig, validate_config
from pipeline.config.cluster import EncoderCost, WorkloadConfig
from pipeline.core.ranks import read_ranks
from pipeline.cost.workload import model_size, row_shape
from pipeline.engine import POLICIES, Engine, build_ds_config, init_process_group
from pipeline.model import PalForCausalLM
from pipeline.training.build import DTYPES, choose_trained, parameter_groups

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "wide": {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8},
}
BUCKET = 1_000_000  # elements; the shipped policies' 50 million would hide everything else of so small a model
WORKLOAD = WorkloadConfig(
    clips=100,
    questions=400,
    clip_s=4.0,
    encoders={"log_mel": EncoderCost(frame_rate_hz=25, width=64)},
    system_tokens=0,
    question_tokens=32,
    answer_tokens=8,
)
STEPS = 8


def write_job(
    folder: Path, size: str, integration: str, zero_stage: int, world_size: int, accumulation: int, **train: Any
) -> ExperimentConfig:
    """A config with a language model of this size, and a policy with small buckets, in `folder`."""
    language_model, policy = folder / size, folder / f"zero{zero_stage}.json"
    LlamaConfig(vocab_size=2000, num_key_value_heads=2, **SIZES[size]).save_pretrained(language_model)
    values = json.loads((POLICIES / policy.name).read_text())
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in values["zero_optimization"]:
            values["zero_optimization"][key] = BUCKET
    policy.write_text(json.dumps(values))
    model = {"language_model": str(language_model), "integration": integration}
    questions = train.pop("questions_per_sequence", 1)
    micro = train.setdefault("micro_batch_size", 8)
    batch = micro * accumulation * world_size * questions
    settings = {"steps": 1, "global_batch_size": batch, "precision": "fp32", "zero": str(policy), **train}
    data = {"train": "unused", "questions_per_sequence": questions}
    return validate_config(
        ExperimentConfig, {"output": "unused", "model": model, "data": data, "train": settings}, "a planned job"
    )


def measure(config: ExperimentConfig, steps: int = STEPS) -> dict[str, float]:
    """Bytes of a rank by part, bytes at the peak of a step, and seconds of one. Runs on every rank.

    Args:
        steps: that are timed, of which the fastest counts; 0 leaves the seconds out.
    """
    ranks = read_ranks()
    init_process_group(ranks, 120)
    torch.manual_seed(0)
    accumulation = config.gradient_accumulation_steps(ranks.world_size)
    size = model_size(config, WORKLOAD)
    dtype = DTYPES[config.train.precision]
    model = PalForCausalLM(size.config).to(dtype)
    choose_trained(model, config.train)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    ds_config = build_ds_config(
        config.train.zero, config.train, world_size=ranks.world_size, accumulation=accumulation, on_gpu=False
    )
    engine = Engine(model, parameter_groups(model, config.train), ds_config)
    batch = make_batch(config)

    def passes() -> None:
        for number in range(accumulation):
            engine.backward(batch, last=number == accumulation - 1)

    for _ in range(2):
        passes()
        engine.step(1.0)
    times = []
    for _ in range(steps):
        engine.barrier()
        start = time.perf_counter()
        passes()
        engine.step(1.0)
        times.append(time.perf_counter() - start)
    before = _bytes(o for o in gc.get_objects() if isinstance(o, Tensor))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        passes()
        held = _held(model, engine)
        engine.step(1.0)
    seconds = {"step_s": min(times)} if times else {}  # others at work only add
    return {**held, "total": before + _highest(profile), **seconds}


def make_batch(config: ExperimentConfig) -> dict[str, Any]:
    """Rows as `planning.row_shape` says; token 0 is the placeholder."""
    row, rows = row_shape(config, WORKLOAD), config.train.micro_batch_size
    length, questions = WORKLOAD.question_tokens, config.data.questions_per_sequence
    text = torch.randint(1, 2000, (rows, questions * length))
    ids = torch.cat([torch.zeros(rows, 1, dtype=torch.long), text], dim=1)
    carries_loss = torch.arange(questions * length) % length >= length - WORKLOAD.answer_tokens
    segments = torch.arange(questions).repeat_interleave(length) + (1 if questions > 1 else 0)
    none = torch.full((rows, 1), -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([none, torch.where(carries_loss, text, -100)], dim=1),
        "segment_ids": torch.cat([torch.zeros_like(none), segments.expand(rows, -1)], dim=1),
        "audio_features": {n: torch.randn(rows * f, WORKLOAD.encoders[n].width) for n, f in row.frames.items()},
        "audio_lengths": {n: torch.full((rows,), f) for n, f in row.frames.items()},
    }


def _held(model: torch.nn.Module, engine: Engine) -> dict[str, int]:
    """Read off the tensors of the model and of DeepSpeed's optimizer, each storage once."""
    outer = engine._engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    parameters = [
        *model.parameters(),
        *(t for p in model.parameters() if (t := getattr(p, "ds_tensor", None)) is not None),
    ]
    states = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor) and t.numel() > 1]
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(outer, "fp32_partitioned_groups_flat", [])  # stage 3 lends them to the optimizer for a step
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [t for part in getattr(outer, "averaged_gradients", {}).values() for t in part or []]
    gradients += getattr(outer, "fp32_groups_gradients_flat", [])
    if getattr(outer, "grad_partitions_flat_buffer", None) is not None:
        gradients.append(outer.grad_partitions_flat_buffer)
    own = {t.untyped_storage().data_ptr() for t in parameters}
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(t for t in [*states, *masters] if t.untyped_storage().data_ptr() not in own),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _highest(profile: Any) -> int:
    """Bytes at the highest point of torch's allocator above where the profile began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
