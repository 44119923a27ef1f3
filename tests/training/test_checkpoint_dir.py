"""Checkpoints are complete or absent, damage is detected, and an output folder has one owner."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.errors import UserError
from pipeline.core.files import lock_folder
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.checkpoint_dir import CheckpointRecord
from pipeline.training.run_dir import RunRecord
from tests.helpers.log_lines import log_lines


def record(step: int, files: dict[str, checkpoint_dir.FileRecord]) -> CheckpointRecord:
    return CheckpointRecord(
        step=step,
        world_size=2,
        zero_stage=2,
        config_sha256="0" * 64,
        data={"packed_examples": step * 32},
        progress={"questions": step * 32.0},
        checksums={"trained": str(step)},
        run_id=None,
        versions={"torch": "2"},
        files=files,
    )


def save(folder: Path, step: int) -> Path:
    temporary = checkpoint_dir.begin(folder, step)
    (temporary / "engine").mkdir()
    for rank in range(2):
        (temporary / "engine" / f"rank-{rank}.pt").write_bytes(bytes([step % 256, rank]) * 5000)
    files = checkpoint_dir.measure(temporary, checkpoint_dir.files_of(temporary))
    return checkpoint_dir.commit(temporary, record(step, files))


def newest_step(folder: Path) -> int | None:
    newest = checkpoint_dir.newest_intact(folder)
    return newest[1].step if newest else None


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 600)
    assert path.name == "step-000600"
    assert checkpoint_dir.verify(path) == checkpoint_dir.read_record(path)
    assert set(checkpoint_dir.read_record(path).files) == {"engine/rank-0.pt", "engine/rank-1.pt"}


def test_the_newest_counts_by_step_and_not_by_name(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert newest_step(tmp_path) == 1_000_000


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "engine" / "rank-1.pt"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[1234] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        (path / checkpoint_dir.RECORD).write_text("{")
    with log_lines() as warnings:
        assert newest_step(tmp_path) == 1
    assert len(warnings) == 1 and "step-000002" in warnings[0]


def test_a_damaged_step_is_replaced_when_training_reaches_it_again(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "engine" / "rank-0.pt").unlink()
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2


def _killed_while_saving(folder: Path, at: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if at == "files":
        checkpoint_dir.begin(folder, 2).joinpath("half.pt").write_bytes(b"x")
        die()
    elif at == "record":
        files.fsync = lambda path: die() if path.is_dir() else None
    else:
        Path.rename = die  # type: ignore[assignment, method-assign]
    save(folder, 2)


@pytest.mark.parametrize("at", ["files", "record", "rename"])
def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path: Path, at: str) -> None:
    save(tmp_path, 1)
    process = multiprocessing.get_context("fork").Process(target=_killed_while_saving, args=(tmp_path, at))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert newest_step(tmp_path) == 1
    save(tmp_path, 2)
    assert newest_step(tmp_path) == 2
    assert not list(tmp_path.glob(".step-*"))


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert newest_step(tmp_path) == 1


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoint_dir.retain(tmp_path, 2)
    assert [p.name for p in checkpoint_dir.list_checkpoints(tmp_path)] == ["step-000004", "step-000003"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((1, 0.5), (2, 0.3), (3, float("nan")), (4, 0.4), (5, 0.6), (6, None)):
        path = save(tmp_path, step)
        if loss is not None:
            checkpoint_dir.record_validation_loss(path, loss)
        checkpoint_dir.retain(tmp_path, 2, keep_best=1)
    assert [p.name[-1] for p in checkpoint_dir.list_checkpoints(tmp_path)] == ["6", "5", "2"]
    assert [p.name[-1] for p in checkpoint_dir.best_checkpoints(tmp_path)] == ["2", "5"]
    assert checkpoint_dir.verify(tmp_path / "step-000002").step == 2
    checkpoint_dir.retain(tmp_path, 1, in_use={tmp_path / "step-000002"})  # as during an upload
    assert [p.name[-1] for p in checkpoint_dir.list_checkpoints(tmp_path)] == ["6", "2"]


def test_lack_of_space_is_reported_with_the_size_and_the_folder(tmp_path: Path) -> None:
    assert checkpoint_dir.space_error(tmp_path, 1) is None
    message = checkpoint_dir.space_error(tmp_path, 2**60)
    assert message and f"{2**30:.3f} GiB" in message and str(tmp_path) in message


def test_another_number_of_ranks_is_refused_unless_every_rank_holds_everything(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    checkpoint_dir.require_resumable(tmp_path, 2, reshard=False)
    checkpoint_dir.require_resumable(tmp_path, 1, reshard=True)
    with pytest.raises(UserError, match=r"written by 2 ranks, this job has 1; add --reshard"):
        checkpoint_dir.require_resumable(tmp_path, 1, reshard=False)
    without_zero = checkpoint_dir.read_record(path).model_copy(update={"zero_stage": 0})
    assert without_zero.fits(1) and without_zero.fits(3)


@pytest.mark.parametrize("reshard", [False, True])
def test_a_checkpoint_of_an_older_format_is_refused_and_never_trained_over(tmp_path: Path, reshard: bool) -> None:
    path = save(tmp_path, 1)
    values = json.loads((path / checkpoint_dir.RECORD).read_text())
    older = {**values, "format_version": 2, "data": {"visits": 32}}
    (path / checkpoint_dir.RECORD).write_text(json.dumps(older))
    refusal = r"step-000001: has checkpoint format 2, .* reads format 3; use the version that wrote it, or start a new"
    for read in (
        lambda: checkpoint_dir.require_resumable(tmp_path, 2, reshard=reshard),
        lambda: checkpoint_dir.newest_intact(tmp_path),
        lambda: checkpoint_dir.verify(path),
    ):
        with pytest.raises(UserError, match=refusal) as error:
            read()
        assert len(str(error.value).splitlines()) == 1
    # The remedy: another output folder.
    checkpoint_dir.require_resumable(tmp_path / "new", 2, reshard=reshard)
    assert checkpoint_dir.newest_intact(tmp_path / "new") is None


def test_an_interrupted_retention_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_dir.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_dir.retain(tmp_path, 1)
    assert [p.name for p in checkpoint_dir.list_checkpoints(tmp_path)] == ["step-000002"]


def test_an_output_folder_belongs_to_one_run(tmp_path: Path) -> None:
    run_dir.require_same_run(tmp_path / "new", {"train.seed": 0})
    run_dir.write_run(tmp_path, RunRecord(identity={"train.seed": 0, "model.encoders": ["log_mel"]}))
    run_dir.require_same_run(tmp_path, {"train.seed": 0, "model.encoders": ["log_mel"]})
    with pytest.raises(UserError, match=r"train\.seed is 0 there and 1"):
        run_dir.require_same_run(tmp_path, {"train.seed": 1, "model.encoders": ["log_mel"]})


def test_checkpoints_without_an_owner_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"run\.json"):
        run_dir.require_same_run(tmp_path, {})


def _hold(folder: Path, ready: object, done: object) -> None:
    with lock_folder(folder, run_dir.LOCK, run_dir.LOCK_PATIENCE_S):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_second_job_in_an_output_folder_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {process.pid}"), lock_folder(tmp_path, run_dir.LOCK, 0.5):
        pass
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)  # however the holder ends, the folder is free again
    process.join()
    with lock_folder(tmp_path, run_dir.LOCK, run_dir.LOCK_PATIENCE_S):
        assert (tmp_path / run_dir.LOCK).exists()
