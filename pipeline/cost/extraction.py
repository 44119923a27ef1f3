"""Time that preparing features takes, and their storage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.cluster import ClusterConfig, EncoderCost, WorkloadConfig
from pipeline.core.units import GIB, GIGA, TERA
from pipeline.cost.workload import mean_frames

FEATURE_BYTES = 2  # float16
QUESTION_BYTES = 250  # one question in a shard, with its answer and names


@dataclass(frozen=True)
class Extraction:
    """What preparing the features costs.

    Attributes:
        hours: the slower of encoding and decoding; None where the cost of an encoder is unknown.
        encoder_hours: encoding on all GPUs; None as above.
        decoding_hours: decoding on all cores.
        storage_gib: size of the features and questions.
        padding: encoder -> seconds that it encodes for each second of audio, for encoders that pad clips to windows.
    """

    hours: float | None
    encoder_hours: float | None
    decoding_hours: float
    storage_gib: float
    padding: dict[str, float]


def extraction(cluster: ClusterConfig, workload: WorkloadConfig, encoders: Sequence[str]) -> Extraction:
    """Returns what preparing the features costs on the cluster.

    Encoders run on all GPUs in half precision, at the cluster's efficiency, while all cores decode: the slower of the
    two sets the time. A clip costs whole windows.
    """
    audio_s = workload.clips * workload.clip_s
    costs = [workload.encoders[name] for name in encoders]
    encoder_s = None
    rates = [cost.gflop_per_encoded_s for cost in costs]
    known = [rate for rate in rates if rate is not None]
    if len(known) == len(rates):
        encoded = [_encoded_s(workload.clip_s, cost) for cost in costs]
        operations = workload.clips * sum(s * rate for s, rate in zip(encoded, known, strict=True)) * GIGA
        rate = max(cluster.gpu.peak_tflops.values()) * TERA * cluster.efficiency * cluster.gpus
        encoder_s = operations / rate
    decode_s = audio_s / (cluster.audio_s_per_core_s * cluster.cores_per_node * cluster.nodes)
    values_per_clip = sum(mean_frames(workload, name) * workload.encoders[name].width for name in encoders)
    stored = workload.clips * values_per_clip * FEATURE_BYTES + workload.questions * QUESTION_BYTES
    return Extraction(
        hours=None if encoder_s is None else max(encoder_s, decode_s) / 3600,
        encoder_hours=None if encoder_s is None else encoder_s / 3600,
        decoding_hours=decode_s / 3600,
        storage_gib=stored / GIB,
        padding={
            name: _encoded_s(workload.clip_s, cost) / workload.clip_s
            for name, cost in zip(encoders, costs, strict=True)
            if cost.window_s is not None and workload.clip_s
        },
    )


def _encoded_s(clip_s: float, cost: EncoderCost) -> float:
    """Returns the seconds that an encoder computes for a clip, padding included."""
    return clip_s if cost.window_s is None else math.ceil(clip_s / cost.window_s) * cost.window_s
