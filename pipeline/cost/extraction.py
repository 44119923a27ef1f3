"""Time and storage of preparing features."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.cluster import ClusterConfig, WorkloadConfig

GIB, TERA = 2**30, 1e12
FEATURE_BYTES = 2  # float16
QUESTION_BYTES = 250  # of a question with its answer and names, in a shard


def extraction(cluster: ClusterConfig, workload: WorkloadConfig, encoders: Sequence[str]) -> dict[str, float]:
    """Hours of preparing the features on the cluster, and what they take on disk.

    Encoders run on all GPUs at the cluster's efficiency in half precision while all cores decode: the slower decides.
    """
    audio_s, works = workload.clips * workload.clip_s, [workload.encoders[name] for name in encoders]
    flops = audio_s * sum(work.gflop_per_audio_s for work in works) * 1e9
    peak = max(cluster.gpu.peak_tflops.values()) * TERA * cluster.efficiency * cluster.gpus
    decode_s = audio_s / (cluster.audio_s_per_core_s * cluster.cores_per_node * cluster.nodes)
    stored = audio_s * FEATURE_BYTES * sum(work.frame_rate_hz * work.width for work in works)
    return {
        "hours": max(flops / peak, decode_s) / 3600,
        "encoder_hours": flops / peak / 3600,
        "decoding_hours": decode_s / 3600,
        "storage_gib": (stored + workload.questions * QUESTION_BYTES) / GIB,
    }
