"""Time that preparing features takes, and their storage."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.cluster import ClusterConfig, WorkloadConfig
from pipeline.core.units import GIB, GIGA, TERA
from pipeline.cost.workload import mean_frames

FEATURE_BYTES = 2  # float16
QUESTION_BYTES = 250  # one question in a shard, with its answer and names


def extraction(cluster: ClusterConfig, workload: WorkloadConfig, encoders: Sequence[str]) -> dict[str, float]:
    """Returns the hours that preparing the features takes on the cluster, and their storage in GiB.

    Encoders run on all GPUs in half precision, at the cluster's efficiency, while all cores decode: the slower of the
    two sets the time.
    """
    audio_s = workload.clips * workload.clip_s
    operations = audio_s * sum(workload.encoders[name].gflop_per_audio_s for name in encoders) * GIGA
    rate = max(cluster.gpu.peak_tflops.values()) * TERA * cluster.efficiency * cluster.gpus
    encoder_s = operations / rate
    decode_s = audio_s / (cluster.audio_s_per_core_s * cluster.cores_per_node * cluster.nodes)
    values_per_clip = sum(mean_frames(workload, name) * workload.encoders[name].width for name in encoders)
    stored = workload.clips * values_per_clip * FEATURE_BYTES + workload.questions * QUESTION_BYTES
    return {
        "hours": max(encoder_s, decode_s) / 3600,
        "encoder_hours": encoder_s / 3600,
        "decoding_hours": decode_s / 3600,
        "storage_gib": stored / GIB,
    }
