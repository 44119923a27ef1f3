"""Each patch of a library is still needed: a test here fails as soon as the library does without it."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from pipeline.core.ranks import read_ranks
from pipeline.engine import init_process_group, patches
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_engine import LANGUAGE_MODEL, build, settings

TIMEOUT_S = 77.0
SCRIPTS = {"zero_to_fp32.py", "zero_to_torch.py"}


def test_deepspeed_compiles_its_shm_all_reduce_unless_the_operator_is_marked_incompatible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed import ops

    deepspeed_torch = importlib.import_module("deepspeed.comm.torch")  # an attribute of that name is torch itself

    builder = MagicMock(NAME="deepspeed_shm_comm")
    monkeypatch.setattr(deepspeed_torch, "get_accelerator", lambda: MagicMock(create_op_builder=lambda _: builder))
    monkeypatch.setattr(ops, "__compatible_ops__", {"deepspeed_shm_comm": True}, raising=False)
    assert deepspeed_torch.build_shm_op() is not None and builder.load.call_count == 1, "patch no longer needed"
    patches.skip_shm_all_reduce()
    assert deepspeed_torch.build_shm_op() is None and builder.load.call_count == 1
    assert "build_shm_op()" in inspect.getsource(deepspeed_torch.TorchBackend.__init__), "patch no longer needed"


def listening_addresses(port: int) -> set[str]:
    """Returns the addresses on which something listens on this port, as Linux writes them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {words[1].partition(":")[0] for words in lines if words[1].endswith(f":{port:04X}") and words[3] == "0A"}


def addresses_of_the_store(patched: bool) -> set[str]:
    """Returns where the store of a new process group listens."""
    if patched:
        init_process_group(read_ranks(), TIMEOUT_S)
    else:
        torch.distributed.init_process_group("gloo")
    return listening_addresses(int(os.environ["MASTER_PORT"]))


def test_the_store_of_a_job_on_one_machine_listens_on_loopback_alone() -> None:
    assert run_on_ranks(addresses_of_the_store, 1, False)[0] != {"0100007F"}, "patch no longer needed"
    assert run_on_ranks(addresses_of_the_store, 1, True)[0] == {"0100007F"}


def timeouts_of_a_new_group() -> list[timedelta]:
    """Returns the timeouts of the default group and of a new one, then of both after the patch."""
    init_process_group(read_ranks(), TIMEOUT_S)
    groups = [torch.distributed.group.WORLD, torch.distributed.new_group()]

    def timeouts() -> list[timedelta]:
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]

    unpatched = timeouts()
    patches.set_group_timeouts(TIMEOUT_S + 1)
    return [*unpatched, *timeouts()]


def test_new_groups_do_not_inherit_the_timeout_of_the_default_group() -> None:
    default, new, *patched = (timeout.total_seconds() for timeout in run_on_ranks(timeouts_of_a_new_group, 1)[0])
    assert default == TIMEOUT_S
    assert new != TIMEOUT_S, "patch no longer needed"
    assert patched == [TIMEOUT_S + 1] * 2


def test_torch_has_no_public_list_of_groups() -> None:
    names = [name for name in dir(torch.distributed) if not name.startswith("_")]
    assert not {"get_all_groups", "get_process_groups", "list_groups", "list_process_groups"} & set(names)
    assert not hasattr(torch.distributed.distributed_c10d, "pg_map")


def save_with_and_without_scripts(folder: Path) -> dict[str, list[str]]:
    engine = build(settings("zero1", 2))
    engine._engine.save_checkpoint(str(folder / "unpatched"), tag="engine", save_latest=False)
    with patches.without_recovery_scripts(engine._engine):
        engine._engine.save_checkpoint(str(folder / "patched"), tag="engine", save_latest=False)
    engine._engine.save_checkpoint(str(folder / "restored"), tag="engine", save_latest=False)
    return {way.name: [file.name for file in way.iterdir()] for way in folder.iterdir()}


def test_deepspeed_copies_its_recovery_scripts_into_every_checkpoint(tmp_path: Path) -> None:
    (names,) = run_on_ranks(save_with_and_without_scripts, 1, tmp_path)
    assert set(names["unpatched"]) & SCRIPTS, "patch no longer needed"
    assert names["patched"] == ["engine"]
    assert set(names["restored"]) >= SCRIPTS


def test_deepspeed_cannot_be_asked_for_a_universal_checkpoint_when_it_loads() -> None:
    from deepspeed import DeepSpeedEngine

    parameters = inspect.signature(DeepSpeedEngine.load_checkpoint).parameters
    assert not [name for name in parameters if "universal" in name], "patch no longer needed"
    engine: Any = MagicMock()
    for universal in (True, False):
        patches.set_universal(engine, universal)
        assert DeepSpeedEngine.load_universal_checkpoint(engine) is universal


def read_frozen_partition() -> tuple[bool, bool]:
    """Returns whether DeepSpeed's public function and the patch give this rank's part of a frozen parameter."""
    from deepspeed.utils import safe_get_local_fp32_param

    engine = build(settings("zero3", 2), LANGUAGE_MODEL)
    parameter = next(p for p in engine._engine.module.parameters() if not p.requires_grad)

    def works(read: Callable[[Any], torch.Tensor | None]) -> bool:
        try:
            part = read(parameter)
        except (AttributeError, KeyError, AssertionError):
            return False
        return part is not None and 2 * part.numel() >= parameter.ds_numel

    def patched(parameter: Any) -> torch.Tensor:
        with patches.local_partition(parameter) as part:
            return part

    return works(safe_get_local_fp32_param), works(patched)


def test_deepspeed_gives_no_access_to_the_partition_of_a_frozen_parameter() -> None:
    for public, patched in run_on_ranks(read_frozen_partition, 2):
        assert not public, "patch no longer needed"
        assert patched


def test_deepspeed_does_not_load_optimizer_states_under_nvme_offload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `restore_swapped_optimizer` restores is compared in `test_nvme.py`, which takes minutes."""
    from deepspeed import DeepSpeedEngine

    engine: Any = MagicMock()
    engine.local_rank = engine.global_rank = 0
    engine._load_checkpoint.return_value = ("path", {})
    monkeypatch.setattr(shutil, "copytree", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (0, 0, 0))
    engine.zero_nvme_offload_optimizer.return_value = False
    DeepSpeedEngine.load_checkpoint(engine, str(tmp_path), tag="engine")
    assert engine._load_zero_checkpoint.call_count == 1
    engine.zero_nvme_offload_optimizer.return_value = True
    DeepSpeedEngine.load_checkpoint(engine, str(tmp_path), tag="engine")
    assert engine._load_zero_checkpoint.call_count == 1, "patch no longer needed"
