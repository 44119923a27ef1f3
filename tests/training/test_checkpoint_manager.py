"""Saving while training continues: a checkpoint holds the state at the save, and a failure costs that save alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ExperimentConfig
from pipeline.core.errors import UserError
from pipeline.core.ranks import read_ranks
from pipeline.engine import Engine, Snapshot
from pipeline.training import checkpoint_dir
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.run_dir import RunRecord
from pipeline.training.throughput import Throughput
from tests.helpers.log_lines import log_lines
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_engine import LANGUAGE_MODEL, build, settings, train_steps

RUN = RunRecord(identity={})


class DummyLoader:
    """A loader that has nothing but a position."""

    packed_examples = 0

    def state_dict(self) -> dict[str, Any]:
        return {"packed_examples": self.packed_examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.packed_examples = state["packed_examples"]


def manager(output: Path, engine: Engine, *, reshard: bool = False, **changes: Any) -> tuple[CheckpointManager, Any]:
    """Returns the checkpoint manager of an engine, and its loader."""
    config = ExperimentConfig.model_validate(
        {
            "output": output,
            "model": {"language_model": "none"},
            "data": {"train": "none", "validation": "none"},
            "train": {"steps": 1, "checkpoint": {"keep": 1, **changes}},
        }
    )
    loader: Any = DummyLoader()
    return CheckpointManager(config, read_ranks(), engine, loader, reshard=reshard), loader


def steps_in(output: Path) -> list[int]:
    return [checkpoint_dir.read_record(path).step for path in checkpoint_dir.list_checkpoints(output)]


def train_while_saving(output: Path, policies: list[str]) -> dict[str, Any]:
    results, write = {}, Snapshot.write
    for policy in policies:
        engine, release = build(settings(policy, 2), LANGUAGE_MODEL), threading.Event()
        checkpoints, loader = manager(output / policy, engine)
        train_steps(engine, range(1), 2)
        loader.packed_examples, saved = 8, engine.checksums()

        def held(snapshot: Snapshot, release: threading.Event = release) -> None:
            release.wait(60)
            write(snapshot)

        Snapshot.write = held  # type: ignore[method-assign]
        checkpoints.save(1, 96, Throughput(questions=8.0), RUN)
        expected = train_steps(engine, range(1, 3), 2)  # changes the weights that are being saved
        checkpoints.poll()
        steps_held = steps_in(output / policy)
        engine.barrier()
        release.set()
        checkpoints.finish()
        steps_committed = steps_in(output / policy)
        engine.barrier()

        fresh = build(settings(policy, 2), LANGUAGE_MODEL)
        checkpoints, loader = manager(output / policy, fresh)
        resumed = checkpoints.resume(), loader.packed_examples, fresh.checksums() == saved
        results[policy] = steps_held, steps_committed, resumed, train_steps(fresh, range(1, 3), 2) == expected
    return results


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    for result in run_on_ranks(train_while_saving, 2, tmp_path, ["zero0", "zero1", "zero2", "zero3"]):
        for policy, (steps_held, steps_committed, resumed, same) in result.items():
            assert (steps_held, steps_committed) == ([], [1]), policy
            assert resumed == ((1, 96, Throughput(questions=8.0)), 8, True), policy
            assert same, f"{policy}: the steps after a resume are not those that followed the save"


def meet_failures(output: Path) -> dict[str, Any]:
    with log_lines() as lines:
        return meet_failures_logged(output, lines)


def meet_failures_logged(output: Path, lines: list[str]) -> dict[str, Any]:
    engine = build(settings("zero2", 2))
    checkpoints, _ = manager(output, engine)
    write, disk_usage = Snapshot.write, checkpoint_dir.shutil.disk_usage
    train_steps(engine, range(1), 2)
    checkpoints.save(1, 0, Throughput(), RUN)
    checkpoints.require_saved()

    def full(snapshot: Snapshot) -> None:
        if read_ranks().rank == 1:
            next(iter(snapshot.files)).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(snapshot)

    Snapshot.write = full  # type: ignore[method-assign]
    checkpoints.save(2, 0, Throughput(), RUN)
    train_steps(engine, range(1), 2)  # nothing hangs
    checkpoints.finish()
    results: dict[str, Any] = {"one rank's disk is full": (steps_in(output), list(output.glob(".step*")), lines[-1:])}
    engine.barrier()
    try:
        checkpoints.require_saved()
    except RuntimeError as error:
        results["required"] = str(error)

    Snapshot.write = write  # type: ignore[method-assign]
    checkpoint_dir.shutil.disk_usage = lambda _: type("", (), {"free": 1000})
    checkpoints.save(3, 0, Throughput(), RUN)
    results["no room"] = steps_in(output), list(output.glob(".step*")), lines[-1:]
    engine.barrier()
    checkpoint_dir.shutil.disk_usage = disk_usage
    checkpoints.save(4, 0, Throughput(), RUN)
    checkpoints.require_saved()
    results["room again"] = steps_in(output)
    return results


def test_a_failed_save_is_logged_and_costs_that_save_alone(tmp_path: Path) -> None:
    main, other = run_on_ranks(meet_failures, 2, tmp_path)
    steps, temporary, (line,) = main["one rank's disk is full"]
    assert (steps, temporary) == ([1], [])
    assert line.startswith("the checkpoint of step 2 is not saved: rank 1: OSError: [Errno 28] No space left on device")
    assert line.endswith("newest saved checkpoint: step-000001")
    assert main["required"] == other["required"] == line.partition("; newest")[0]
    assert other["one rank's disk is full"][2] == other["no room"][2] == []  # rank 0 speaks for all
    steps, temporary, (line,) = main["no room"]
    assert (steps, temporary) == ([1], []) and "GiB free" in line and "it needs 0.00" in line
    assert main["room again"] == other["room again"] == [4]


class UploadingTracker:
    """A tracker in the middle of an upload."""

    def __init__(self, uploading: Path) -> None:
        self.uploading, self.named = uploading, list[list[str]]()

    def log_folders(self, folders: list[Path]) -> None:
        self.named.append([folder.name for folder in folders])


def keep_the_best(output: Path) -> list[list[int]]:
    engine, steps_kept = build(settings("zero2", 2)), []
    checkpoints, _ = manager(output, engine, keep_best=1)
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6)):
        checkpoints.save(step, 0, Throughput(), RUN)
        checkpoints.record_validation_loss(step, loss)  # the checkpoint is still being written
        checkpoints.finish()
        steps_kept.append(steps_in(output))
        engine.barrier()
    uploads: Any = UploadingTracker(output / checkpoint_dir.checkpoint_name(4))
    if read_ranks().is_main:
        checkpoints.upload_to(uploads)
    checkpoints.save(5, 0, Throughput(), RUN)
    checkpoints.record_validation_loss(5, 0.1)
    checkpoints.finish()
    if read_ranks().is_main:
        assert uploads.named[0] == ["step-000004", "step-000002"]
        assert uploads.named[-1] == ["step-000005", "step-000004", "step-000002"]
    return [*steps_kept, steps_in(output)]


def test_the_best_checkpoints_and_the_one_being_uploaded_stay(tmp_path: Path) -> None:
    assert run_on_ranks(keep_the_best, 2, tmp_path)[0] == [[1], [2], [3, 2], [4, 2], [5, 4]]
    assert checkpoint_dir.best_checkpoints(tmp_path)[0].name == "step-000005"


def save_once(output: Path) -> None:
    checkpoints, _ = manager(output, build(settings("zero2", 2), LANGUAGE_MODEL))
    checkpoints.save(1, 0, Throughput(), RUN)
    checkpoints.require_saved()


def resume_in_vain(output: Path) -> list[str]:
    """Resumes with another language model, and at another number of ranks."""
    engine = build(settings("zero2", 2), LANGUAGE_MODEL)
    messages = []
    for frozen in ("another", engine.checksums()["frozen"]):
        engine._frozen_checksum = frozen
        checkpoints, _ = manager(output, engine)
        if read_ranks().world_size == 2 and frozen != "another":
            continue
        with pytest.raises(UserError) as error:
            checkpoints.resume()
        messages.append(str(error.value))
    return messages


def test_a_checkpoint_that_does_not_fit_is_a_user_error(tmp_path: Path) -> None:
    run_on_ranks(save_once, 2, tmp_path)
    (message,) = run_on_ranks(resume_in_vain, 2, tmp_path)[0]
    assert "model.language_model" in message and "other weights" in message
    assert all("--reshard" in message for message in run_on_ranks(resume_in_vain, 1, tmp_path)[0])


def save_trained(output: Path) -> str:
    engine = build(settings("zero2", 2), LANGUAGE_MODEL)
    train_steps(engine, range(1), 2)
    checkpoints, _ = manager(output, engine)
    checkpoints.save(1, 96, Throughput(), RUN)
    checkpoints.require_saved()
    return engine.checksums()["trained"]


def resume_resharded(output: Path) -> tuple[int, str, list[str]]:
    engine = build(settings("zero2", 2), LANGUAGE_MODEL)
    checkpoints, _ = manager(output, engine, reshard=True)
    with log_lines() as lines:
        step, *_ = checkpoints.resume()
    return step, engine.checksums()["trained"], lines


def load_nothing(output: Path) -> str:
    engine: Any = build(settings("zero2", 2), LANGUAGE_MODEL)
    engine.load = lambda *_, **__: None  # a library that finds nothing to load and reports no error
    checkpoints, _ = manager(output, engine)
    with pytest.raises(RuntimeError) as error:
        checkpoints.resume()
    return str(error.value)


def test_the_loaded_weights_are_the_saved_ones_at_any_number_of_ranks(tmp_path: Path) -> None:
    trained = run_on_ranks(save_trained, 2, tmp_path)[0]
    assert "are not those that were saved" in run_on_ranks(load_nothing, 2, tmp_path)[0]
    step, resumed, lines = run_on_ranks(resume_resharded, 1, tmp_path)[0]
    assert (step, resumed) == (1, trained)
    assert "from 2 to 1 ranks" in lines[0]
