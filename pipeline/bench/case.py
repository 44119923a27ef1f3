"""One measurement of `pal bench integration`: a model of some shape and a batch in memory; seconds and bytes of a step.

Imports torch and transformers only where they are used, so that the command's help appears at once."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pipeline.core.streams import Preset
    from pipeline.model import PalConfig

FLAMINGO_LAYER_STRIDE = 4  # the 9B model of arXiv 2204.14198, table 1
WARM_UP_STEPS = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model: widths of its hidden states and feed-forward layers, and counts."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "small": Shape(layers=8, hidden=512, ffn=2048, heads=8, kv_heads=2, vocabulary=8000),
    "llama-3.2-1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, vocabulary=128256),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        variant: preset of the integration, or `text_only`.
        mode: `train` or `decode`.
        num_audio_tokens: frames of a clip, each of which becomes one token; summaries have fewer.
        num_text_tokens: text tokens of a question with its answer.
        answer_tokens: how many of the text tokens carry loss, or are generated.
        questions_per_clip: questions packed behind each clip in training; decoding answers one.
        batch: number of clips.
        feature_width: width of the audio features.
        steps: number of timed steps.
        threads: threads of torch; None means torch's own choice.
    """

    variant: str
    mode: str
    shape: Shape
    num_audio_tokens: int
    num_text_tokens: int
    answer_tokens: int
    questions_per_clip: int
    batch: int
    feature_width: int
    device: str
    dtype: str
    steps: int
    threads: int | None = None

    @property
    def frames(self) -> dict[str, int]:
        """Frames of a clip in each encoder; `pal_v2` has half of them in the sequence."""
        half = self.num_audio_tokens // 2
        if self.variant == "text_only":
            return {}
        if self.variant == "pal_v2":
            return {"first": half, "second": self.num_audio_tokens - half}
        return {"first": self.num_audio_tokens}


def model_config(case: Case) -> PalConfig:
    """Returns the config of a case's model."""
    from transformers import LlamaConfig

    from pipeline.core.streams import Connector, LayerRule, preset_streams
    from pipeline.model import PalConfig

    shape = case.shape
    language_model = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    streams: Any = ()
    if case.variant != "text_only":
        layers = LayerRule(layer_stride=FLAMINGO_LAYER_STRIDE if case.variant == "flamingo" else 1)
        # PLITS has the usual two-layer connector. Beside the sequence a linear one is enough: every audio layer adds
        # its own two-layer projection, and reads tokens no wider than itself.
        linear = Connector("linear", width=min(case.feature_width, shape.hidden))
        connector = Connector("mlp") if case.variant == "plits" else linear
        preset = cast("Preset", case.variant)
        streams = preset_streams(preset, list(case.frames), shape.layers, connector=connector, layers=layers)
    widths = dict.fromkeys(case.frames, case.feature_width)
    return PalConfig(language_model, streams, widths, audio_token_id=shape.vocabulary)


def run(case: Case) -> tuple[float, int]:
    """Measures a case in this process.

    Returns:
        the median seconds of a step, and the bytes of all tensors at the peak: parameters, gradients, optimizer state,
        batch and activations.
    """
    import torch

    if case.threads is not None:
        torch.set_num_threads(case.threads)
    peak = _peak_bytes(case)
    step = _make_step(case)
    _warm_up(step)
    times = []
    for _ in range(case.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak


def _peak_bytes(case: Case) -> int:
    """Returns the most bytes that torch's allocator holds, from an empty model to the end of the second step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _warm_up(_make_step(case))
        return torch.cuda.max_memory_allocated()
    # On a CPU the profiler counts; resident memory would add what libraries and the system's allocator hold.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        _warm_up(_make_step(case))
    with TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))
    return max(e["args"]["Total Allocated"] for e in trace["traceEvents"] if e["name"] == "[memory]")


def _warm_up(step: Callable[[], None]) -> None:
    for _ in range(WARM_UP_STEPS):
        step()


def _make_step(case: Case) -> Callable[[], None]:
    """Returns a function that trains one step or answers one batch, and returns when the device has finished."""
    import torch

    from pipeline.model import PalForCausalLM

    model = PalForCausalLM(model_config(case)).to(case.device, getattr(torch, DTYPES[case.dtype]))
    batch = make_batch(case)
    batch = {
        name: {k: v.to(case.device) for k, v in x.items()} if isinstance(x, dict) else x.to(case.device)
        for name, x in batch.items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(case.device)

    def decode() -> None:
        model.generate(**batch, do_sample=False, max_new_tokens=case.answer_tokens)
        _synchronise(case.device)

    return train if case.mode == "train" else decode


def make_batch(case: Case) -> dict[str, Any]:
    """Returns rows of a clip's placeholder and the questions packed behind it; without the answers for decoding.

    Questions without a clip share nothing: `text_only` has a row for each, which is its best case.
    """
    import torch

    torch.manual_seed(0)
    questions, length = case.questions_per_clip, case.num_text_tokens
    rows = case.batch
    if not case.frames:
        rows, questions = rows * questions, 1
    if case.mode == "decode":
        length -= case.answer_tokens
    text = torch.randint(1, case.shape.vocabulary, (rows, questions * length))
    clip = torch.full((rows, 1 if case.frames else 0), case.shape.vocabulary)
    input_ids = torch.cat([clip, text], dim=1)
    features = {n: torch.randn(rows * frames, case.feature_width) for n, frames in case.frames.items()}
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "audio_features": features,
        "audio_lengths": {n: torch.full((rows,), frames) for n, frames in case.frames.items()},
    }
    if case.mode == "decode":
        return batch
    loss = torch.arange(questions * length) % length >= length - case.answer_tokens
    batch["labels"] = torch.cat([torch.full_like(clip, -100), torch.where(loss, text, -100)], dim=1)
    segments = torch.arange(questions).repeat_interleave(length) + (1 if questions > 1 else 0)
    batch["segment_ids"] = torch.cat([torch.zeros_like(clip), segments.expand(rows, -1)], dim=1)
    return batch


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
