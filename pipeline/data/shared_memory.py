"""Bounds the loader's workers by the shared memory of the machine, through which they hand over their batches."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core.console import logger
from pipeline.core.ranks import read_ranks
from pipeline.core.units import MIB
from pipeline.data.feature_set import FeatureSet

SHARED_MEMORY = Path("/dev/shm")
USABLE = 0.8  # of the free memory: Gloo, NCCL and the allocator take some as well
OVERHEAD_BYTES = 64 << 10  # of a batch: token ids, labels and the parts of its clips


def batch_bytes(sets: Sequence[FeatureSet], rows: int, bytes_per_value: int) -> float:
    """Returns the size of a batch of mean clips, from the set with the longest ones."""
    frames_s = [
        float(np.mean(feature_set.table.duration_s)) * encoder.frame_rate_hz * encoder.width
        for feature_set in sets
        if len(feature_set)
        for encoder in (feature_set.contract.encoders[name] for name in feature_set.encoders)
    ]
    return OVERHEAD_BYTES + rows * bytes_per_value * sum(frames_s)


def fitting_workers(workers: int, batch: float, batches_per_worker: int) -> int:
    """Returns how many of these workers find room for their prefetched batches; warns where it is not all of them.

    Without room a worker dies from a bus error, whose message names neither the memory nor the setting.

    Args:
        batch: size of a batch in bytes.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    ranks = read_ranks()
    free = shutil.disk_usage(SHARED_MEMORY).free * USABLE / ranks.local_world_size
    fitting = min(workers, int(free / (batch * batches_per_worker)))
    if fitting < workers and ranks.local_rank == 0:
        needed = workers * batch * batches_per_worker * ranks.local_world_size / USABLE
        logger.warning(
            f"{SHARED_MEMORY} has {shutil.disk_usage(SHARED_MEMORY).free / MIB:.0f} MiB free, and data.workers "
            f"{workers} needs about {needed / MIB:.0f} MiB: {fitting or 'no'} workers are used; enlarge it "
            "(docker run --shm-size=16g) or lower data.workers"
        )
    return fitting
