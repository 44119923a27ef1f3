"""The small runs of `pal bench plan`: their configs and batches, and the measurement of one rank."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from pipeline.config import ExperimentConfig, validate_config
from pipeline.config.cluster import EncoderCost, WorkloadConfig
from pipeline.core.ranks import read_ranks
from pipeline.cost.workload import model_size, row_shape
from pipeline.engine import POLICIES, Engine, build_ds_config, init_process_group, parameter_groups
from pipeline.engine.state_bytes import state_bytes, storage_bytes
from pipeline.model import PalForCausalLM
from pipeline.training.build import DTYPES, choose_trained

if TYPE_CHECKING:
    from pipeline.bench.plan import PlannedRun

VOCABULARY = 2000
SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "wide": {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8},
}
BUCKET = 1_000_000  # elements; the shipped policies' 50 million would hide everything else of so small a model
BUCKET_KEYS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
WORKLOAD = WorkloadConfig(
    clips=100,
    questions=400,
    clip_s=4.0,
    encoders={"log_mel": EncoderCost(frame_rate_hz=25, width=64)},
    system_tokens=0,
    question_tokens=32,
    answer_tokens=8,
)
MICRO_BATCH_SIZE = 8
COLLECTIVE_TIMEOUT_S = 120.0
WARM_UP_STEPS = 2


def write_config(folder: Path, run: PlannedRun, *, questions: int = 1, **train: Any) -> ExperimentConfig:
    """Writes a language model and a ZeRO policy with small buckets to `folder`, and returns a config that names them.

    Args:
        questions: questions that are packed behind one clip.
        train: further settings of `train`.
    """
    language_model, policy = folder / run.size, folder / f"zero{run.zero_stage}.json"
    LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES[run.size]).save_pretrained(language_model)
    values = json.loads((POLICIES / policy.name).read_text(encoding="utf-8"))
    zero = values["zero_optimization"]
    zero |= {key: BUCKET for key in BUCKET_KEYS if key in zero}
    policy.write_text(json.dumps(values), encoding="utf-8")
    micro_batch_size = train.setdefault("micro_batch_size", MICRO_BATCH_SIZE)
    settings = {
        "steps": 1,
        "global_batch_size": micro_batch_size * run.accumulation * run.ranks * questions,
        "precision": run.precision,
        "zero": str(policy),
        **train,
    }
    values = {
        "output": "unused",
        "model": {"language_model": str(language_model), "integration": run.integration},
        "data": {"train": "unused", "questions_per_sequence": questions},
        "train": settings,
    }
    return validate_config(ExperimentConfig, values, "a planned run")


def measure(config: ExperimentConfig, steps: int) -> dict[str, float]:
    """Measures a run on this rank; every rank of the group calls it.

    Args:
        steps: number of timed steps, of which the fastest counts; 0 leaves `step_s` out.

    Returns:
        bytes by part (see `state_bytes`), `total` bytes at the peak of a step, and `step_s`.
    """
    ranks = read_ranks()
    init_process_group(ranks, COLLECTIVE_TIMEOUT_S)
    torch.manual_seed(0)
    accumulation = config.gradient_accumulation_steps(ranks.world_size)
    engine = _build_engine(config, ranks.world_size, accumulation)
    batch = make_batch(config)

    def passes() -> None:
        for number in range(accumulation):
            engine.backward(batch, last=number == accumulation - 1)

    for _ in range(WARM_UP_STEPS):
        passes()
        engine.step(1.0)
    times = []
    for _ in range(steps):
        engine.barrier()
        start = time.perf_counter()
        passes()
        engine.step(1.0)
        times.append(time.perf_counter() - start)
    bytes_before = storage_bytes(o for o in gc.get_objects() if isinstance(o, Tensor))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        passes()
        states = state_bytes(engine)
        engine.step(1.0)
    seconds = {"step_s": min(times)} if times else {}  # other processes only add
    return {**states, "total": bytes_before + _peak_bytes(profile), **seconds}


def _build_engine(config: ExperimentConfig, world_size: int, accumulation: int) -> Engine:
    model = PalForCausalLM(model_size(config, WORKLOAD).config).to(DTYPES[config.train.precision])
    choose_trained(model, config.train)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    ds_config = build_ds_config(
        config.train.zero, config.train, world_size=world_size, accumulation=accumulation, on_gpu=False
    )
    return Engine(model, parameter_groups(model, config.train), ds_config)


def make_batch(config: ExperimentConfig) -> dict[str, Any]:
    """Returns a micro-batch of random rows, each of the sizes that `cost.workload.row_shape` plans with.

    Token 0 is the placeholder of the clip.
    """
    row, rows = row_shape(config, WORKLOAD), config.train.micro_batch_size
    length, questions = WORKLOAD.question_tokens, config.data.questions_per_sequence
    text = torch.randint(1, VOCABULARY, (rows, questions * length))
    ids = torch.cat([torch.zeros(rows, 1, dtype=torch.long), text], dim=1)
    carries_loss = torch.arange(questions * length) % length >= length - WORKLOAD.answer_tokens
    segments = torch.arange(questions).repeat_interleave(length) + (1 if questions > 1 else 0)
    no_label = torch.full((rows, 1), -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([no_label, torch.where(carries_loss, text, -100)], dim=1),
        "segment_ids": torch.cat([torch.zeros_like(no_label), segments.expand(rows, -1)], dim=1),
        "audio_features": {n: torch.randn(rows * f, WORKLOAD.encoders[n].width) for n, f in row.frames.items()},
        "audio_lengths": {n: torch.full((rows,), f) for n, f in row.frames.items()},
    }


def _peak_bytes(profile: Any) -> int:
    """Returns the most bytes that torch's allocator held above what it held when the profile began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
