"""Ranks from each launcher's environment."""

import os

import pytest

from pipeline.core.ranks import Ranks, read_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # read_ranks sets it; monkeypatch takes it back afterwards


def test_single_process() -> None:
    assert read_ranks() == Ranks(0, 1, 0, 1)
    assert read_ranks().is_main


def test_deepspeed_tells_local_size_and_streaming_gets_local_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_ranks() == Ranks(5, 8, 1, 4)
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"


def test_several_ranks_without_a_local_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="LOCAL_WORLD_SIZE"):
        read_ranks()
