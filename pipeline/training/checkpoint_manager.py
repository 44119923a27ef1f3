"""Saves the state of all ranks as checkpoints, and resumes from the newest intact one.

A save has three parts: every rank copies its state (training waits), writes and hashes its files in a thread (training
continues), and rank 0 commits the checkpoint at the end of the first step by which all ranks have written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, dump_config
from pipeline.core import provenance
from pipeline.core.console import logger
from pipeline.core.errors import UserError
from pipeline.core.ranks import Ranks
from pipeline.data.loader import TrainingLoader
from pipeline.engine import Engine, Snapshot, start_resharding
from pipeline.tracking.writer import Tracker
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.checkpoint_dir import CheckpointRecord, FileRecord
from pipeline.training.run_dir import RunRecord
from pipeline.training.throughput import Throughput

_POLL_S = 0.2


@dataclass(frozen=True)
class _Save:
    """A save in progress; the record still lacks its files."""

    record: CheckpointRecord
    temporary: Path
    written: Future[dict[str, FileRecord]]


class CheckpointManager:
    """Checkpoints of one engine and one loader in `config.output`. All ranks call every method except `upload_to`.

    Args:
        reshard: resume from a checkpoint of another number of ranks too.
    """

    def __init__(
        self, config: ExperimentConfig, ranks: Ranks, engine: Engine, loader: TrainingLoader, *, reshard: bool = False
    ) -> None:
        self._config, self._settings, self._output = config, config.train.checkpoint, config.output
        self._ranks, self._engine, self._loader = ranks, engine, loader
        self._reshard = reshard
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._losses: dict[int, float] = {}
        self._failure: str | None = None
        self._tracker: Tracker | None = None

    # ---- saving -----------------------------------------------------------------------------------------------------

    def upload_to(self, tracker: Tracker) -> None:
        """Uploads all existing and future checkpoints to the MLflow run. Only rank 0 calls it."""
        self._tracker = tracker
        self._prune()

    def save(self, step: int, seen_tokens: int, throughput: Throughput, run: RunRecord) -> None:
        """Finishes the previous checkpoint and starts that of `step`; logs a failure, which costs that save alone.

        Args:
            seen_tokens: text tokens of all steps so far.
            throughput: of all steps so far.
            run: run that owns the output folder.
        """
        self.finish()
        temporary = checkpoint_dir.temporary_path(self._output, step)
        if self._failed(step, self._on_main(lambda: self._begin(temporary, step))):
            return
        snapshot = self._engine.snapshot(temporary, copied=self._settings.background)
        names = checkpoint_dir.files_of(temporary)[self._ranks.rank :: self._ranks.world_size]
        (num_bytes,) = self._engine.sum_over_ranks([snapshot.num_bytes])
        if self._failed(step, self._on_main(lambda: checkpoint_dir.space_error(self._output, num_bytes))):
            if self._ranks.is_main:
                checkpoint_dir.discard(temporary)
            return
        record = CheckpointRecord(
            step=step,
            world_size=self._ranks.world_size,
            zero_stage=self._engine.stage,
            config_sha256=run.sha256,
            data=self._loader.state_dict(),
            progress={
                **asdict(throughput),
                "seen_tokens": seen_tokens,
                "skipped_steps": self._engine.skipped_steps,
            },
            checksums=self._engine.checksums(),
            run_id=run.run_id,
            versions=provenance.package_versions(),
            files={},
        )
        self._save = _Save(record, temporary, self._writer.submit(_write, temporary, snapshot, names))
        if not self._settings.background:
            self.finish()

    def poll(self) -> None:
        """Commits the checkpoint in progress if all ranks have written their files; call it after every step."""
        if self._save is not None:
            (done,) = self._engine.sum_over_ranks([self._save.written.done()])
            if done == self._ranks.world_size:
                self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint in progress and commits it."""
        if self._save is None:
            return
        save, self._save = self._save, None
        outcomes = self._engine.gather_over_ranks(_outcome(save.written))
        errors = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        files = {name: file for outcome in outcomes if isinstance(outcome, dict) for name, file in outcome.items()}
        record = save.record.model_copy(update={"files": files})
        failure = errors[0] if errors else self._on_main(lambda: self._commit(save.temporary, record))
        if self._failed(record.step, failure) and self._ranks.is_main:
            checkpoint_dir.discard(save.temporary)

    def require_saved(self) -> None:
        """Waits for the newest save.

        Raises:
            RuntimeError: it failed.
        """
        self.finish()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def record_validation_loss(self, step: int, loss: float) -> None:
        """Records the validation loss of the checkpoint of `step`, whether it is committed or in progress."""
        if self._ranks.is_main:
            self._losses[step] = loss
            self._prune()

    def _on_main(self, action: Callable[[], str | None]) -> str | None:
        """Calls `action` on rank 0; returns its result, or the error of the disk, on all ranks."""
        failure = None
        if self._ranks.is_main:
            try:
                failure = action()
            except OSError as error:
                failure = str(error)
        return self._engine.gather_over_ranks(failure)[0]

    def _failed(self, step: int, failure: str | None) -> bool:
        self._failure = None if failure is None else f"the checkpoint of step {step} is not saved: {failure}"
        if failure is not None and self._ranks.is_main:
            newest = next((path.name for path in checkpoint_dir.list_checkpoints(self._output)), "none")
            logger.warning(f"{self._failure}; newest saved checkpoint: {newest}")
        return failure is not None

    def _begin(self, temporary: Path, step: int) -> None:
        checkpoint_dir.begin(self._output, step)
        (temporary / run_dir.CONFIG).write_text(dump_config(self._config), encoding="utf-8")

    def _commit(self, temporary: Path, record: CheckpointRecord) -> None:
        checkpoint_dir.commit(temporary, record)
        self._prune()

    def _prune(self) -> None:
        """Writes validation losses into committed checkpoints, uploads checkpoints and removes old ones."""
        for step in list(self._losses):
            if (path := self._output / checkpoint_dir.checkpoint_name(step)).is_dir():
                checkpoint_dir.record_validation_loss(path, self._losses.pop(step))
        in_use: set[Path] = set()
        if self._tracker is not None:
            self._tracker.log_folders(checkpoint_dir.list_checkpoints(self._output))
            in_use = {self._tracker.uploading} if self._tracker.uploading else set()
        checkpoint_dir.retain(self._output, self._settings.keep, self._settings.keep_best, in_use)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def resume(self) -> tuple[int, int, Throughput]:
        """Loads the newest intact checkpoint; returns the steps, text tokens and throughput of the run so far.

        Raises:
            UserError: another number of ranks or another version of this software wrote it, the order of the data
                differs, or the language model is another.
            RuntimeError: the loaded weights are not the saved ones.
        """
        newest = checkpoint_dir.newest_intact(self._output) if self._ranks.is_main else None
        newest = self._engine.gather_over_ranks(newest)[0]
        if newest is None:
            return 0, 0, Throughput()
        path, record = newest
        if record.fits(self._ranks.world_size):
            self._engine.load(path)
        elif self._reshard:
            self._load_resharded(path, record)
        else:
            raise checkpoint_dir.world_size_error(path, record.world_size, self._ranks.world_size)
        self._compare(path, record)
        self._loader.load_state_dict(record.data)
        progress = dict(record.progress)
        self._engine.skipped_steps = int(progress.pop("skipped_steps"))
        logger.info(f"resumed from {path} at step {record.step}")
        return record.step, int(progress.pop("seen_tokens")), Throughput(**progress)

    def _load_resharded(self, path: Path, record: CheckpointRecord) -> None:
        logger.info(f"converting {path} from {record.world_size} to {self._ranks.world_size} ranks")
        converted = checkpoint_dir.temporary_path(self._output, record.step)
        if self._ranks.is_main:
            shutil.rmtree(converted, ignore_errors=True)
        process = start_resharding(path, converted) if self._ranks.is_main else None
        try:
            # Polls with short collectives, because one that waits for the conversion of a large model would time out.
            while (code := self._engine.gather_over_ranks(process.poll() if process else None)[0]) is None:
                time.sleep(_POLL_S)
            if code:
                raise RuntimeError(f"{path} cannot be converted: DeepSpeed's converter ended with code {code}")
            self._engine.load(converted, universal=True)
            self._engine.barrier()
        finally:
            if self._ranks.is_main:
                checkpoint_dir.discard(converted)

    def _compare(self, path: Path, record: CheckpointRecord) -> None:
        loaded = self._engine.checksums()
        if loaded.get("frozen") != record.checksums.get("frozen"):
            fault = f"has other weights than the one that {path} was trained with"
            raise UserError("model.language_model", fault, "set it to the same language model")
        if loaded != record.checksums:
            raise RuntimeError(f"the weights loaded from {path} are not those that were saved")


def _write(temporary: Path, snapshot: Snapshot, names: list[str]) -> dict[str, FileRecord]:
    """Writes a snapshot; returns the records of its files and of those in `names`, which exist already."""
    snapshot.write()
    return checkpoint_dir.measure(temporary, [*names, *(str(p.relative_to(temporary)) for p in snapshot.files)])


def _outcome(written: Future[dict[str, Any]]) -> dict[str, Any] | str:
    """Returns the records of the files, or a sentence that says why they could not be written."""
    try:
        return written.result()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        return f"{type(error).__name__}: {error}"
