"""Workers of the loader that find no room in shared memory are not started."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.data import shared_memory
from pipeline.data.feature_set import FeatureSet
from pipeline.data.shared_memory import OVERHEAD_BYTES, batch_bytes, fitting_workers
from tests.helpers.feature_sets import write_feature_set
from tests.helpers.log_lines import log_lines

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free_mib", "fitting"), [(64, 3), (11, 2), (6, 1), (1, 0)])
def test_workers_are_as_many_as_fit(free_mib: int, fitting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: Usage(0, 0, free_mib << 20))
    with log_lines() as lines:
        assert fitting_workers(3, 1 << 20, 4) == fitting
    assert bool(lines) is (fitting < 3)
    assert all(f"{fitting or 'no'} workers are used" in line and "needs about 15 MiB" in line for line in lines)


def test_a_batch_is_as_large_as_its_mean_clips(tmp_path: Path) -> None:
    features = FeatureSet(write_feature_set(tmp_path, [1, 1, 1]), ["log_mel"])  # clips of 1, 2 and 3 s, 25 x 8 a second
    assert batch_bytes([features], 5, 2) == OVERHEAD_BYTES + 5 * 2 * 2 * 25 * 8
    assert batch_bytes([FeatureSet(tmp_path, [])], 5, 2) == OVERHEAD_BYTES
