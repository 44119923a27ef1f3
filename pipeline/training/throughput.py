"""Throughput and memory of a training run. Reads clocks and counters, never the values of tensors."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from pipeline.core.console import format_duration
from pipeline.core.units import GIB


@dataclass
class Throughput:
    """What was trained on in a span of time, on one rank or added up over ranks.

    Attributes:
        questions: number of questions.
        text_tokens: number of text tokens.
        audio_s: duration of the audio.
        wait_s: time spent waiting for data, as part of `elapsed_s`.
        elapsed_s: time spent training, without checkpoints and validation.
    """

    questions: float = 0.0
    text_tokens: float = 0.0
    audio_s: float = 0.0
    wait_s: float = 0.0
    elapsed_s: float = 0.0

    def __add__(self, other: Throughput) -> Throughput:
        return Throughput(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def rates(self, world_size: int) -> dict[str, float]:
        """Returns rates as metrics, from sums over `world_size` ranks; empty if no time was measured."""
        if not self.elapsed_s:
            return {}
        wall_s = self.elapsed_s / world_size
        return {
            "samples_per_s": self.questions / wall_s,
            "text_tokens_per_s": self.text_tokens / wall_s,
            "audio_s_per_s": self.audio_s / wall_s,
            "data_wait_fraction": self.wait_s / self.elapsed_s,
        }


THROUGHPUT_FIELDS = tuple(f.name for f in fields(Throughput))


class ThroughputMeter:
    """Measures the throughput of this rank, lap by lap."""

    def __init__(self) -> None:
        self._lap = Throughput()
        self._lap_start = time.perf_counter()
        self._laps_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Time spent training in this process, without pauses."""
        return self._laps_s + time.perf_counter() - self._lap_start

    def count(self, questions: int, text_tokens: int, audio_s: float) -> None:
        """Adds one micro-batch."""
        self._lap.questions += questions
        self._lap.text_tokens += text_tokens
        self._lap.audio_s += audio_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._lap.wait_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time within the block (checkpoints, validation)."""
        start = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - start

    def lap(self) -> Throughput:
        """Returns the throughput since the previous call."""
        now = time.perf_counter()
        lap, self._lap = self._lap, Throughput()
        lap.elapsed_s, self._lap_start = now - self._lap_start, now
        self._laps_s += lap.elapsed_s
        return lap


class TimeLeft:
    """Estimates the remaining time of a run by the steps that this process took after its first one.

    The first step compiles kernels and fills caches, and may take as long as many others; a resumed run may be on
    another machine than its first steps.
    """

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None

    def begin(self, done: int, elapsed_s: float) -> None:
        """Notes the progress of the run and the time after a step; calls after the first one change nothing."""
        self._start = self._start or (done, elapsed_s)

    def estimate(self, done: int, goal: int, elapsed_s: float) -> str:
        """Returns `2 min 10 s left`, or `time left unknown` before the second step of this process.

        Args:
            done, goal: progress of the run, in steps or tokens.
            elapsed_s: time since the training began in this process.
        """
        if self._start is None or done <= self._start[0]:
            return "time left unknown" if done < goal else f"{format_duration(0)} left"
        rate = (elapsed_s - self._start[1]) / (done - self._start[0])
        return f"{format_duration(rate * max(0, goal - done))} left"


def peak_memory_gib(device: torch.device) -> float:
    """Returns this rank's peak memory: allocated on its GPU, or on CPU resident in its process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # Not getrusage: its maximum is inherited from the launcher that started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB


# Dense half-precision TFLOP/s from the vendors' data sheets, by words in the device's name; the first match counts.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A40", 150.0),
    ("A10G", 70.0),
    ("L4", 121.0),
)


def peak_flops(device: torch.device, precision: str, peak_tflops: float | None) -> float | None:
    """Returns the peak FLOP/s of one device; None if neither the setting nor the name of the device tells.

    Args:
        peak_tflops: `train.peak_tflops`.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for words, tflops in _PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)
