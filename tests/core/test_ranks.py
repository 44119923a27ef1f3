"""The position of a process, from the environment of each launcher."""

import os
import socket

import pytest

from pipeline.core.ranks import Ranks, free_port, is_cpu_forced, is_rank, read_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # read_ranks sets it; monkeypatch restores it afterwards


def test_a_process_without_a_launcher_is_a_group_of_one() -> None:
    assert read_ranks() == Ranks(0, 1, 0, 1)
    assert read_ranks().is_main


def test_local_size_of_deepspeed_becomes_local_world_size_for_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_ranks() == Ranks(5, 8, 1, 4)
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"


def test_several_ranks_without_a_local_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="LOCAL_WORLD_SIZE"):
        read_ranks()


def test_a_launcher_makes_a_process_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_rank()
    monkeypatch.setenv("RANK", "0")
    assert is_rank()


@pytest.mark.parametrize(("accelerator", "forced"), [(None, False), ("cuda", False), ("cpu", True)])
def test_deepspeeds_variable_forces_the_cpu(
    accelerator: str | None, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert is_cpu_forced() == forced


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        assert listener.getsockname()[1] > 0
