"""What of a run is kept: saves the state of all ranks as checkpoints, and finds the one to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from pipeline import checkpoint, provenance
from pipeline.checkpoint import CheckpointRecord
from pipeline.config import ExperimentConfig, dump_config
from pipeline.data.loader import TrainingLoader
from pipeline.distributed import Ranks
from pipeline.metrics import Work
from pipeline.zero import Engine


class Keeper:
    """Checkpoints of one engine and one loader in `config.output`. Every method is called by all ranks.

    Args:
        say: prints a line for the person who watches; called on rank 0 only.
    """

    def __init__(
        self, config: ExperimentConfig, ranks: Ranks, engine: Engine, loader: TrainingLoader, say: Callable[[str], None]
    ) -> None:
        self._config, self._settings, self._output = config, config.train.checkpoint, config.output
        self._ranks, self._engine, self._loader, self._say = ranks, engine, loader, say

    def save(self, step: int, work: Work, run: checkpoint.RunRecord) -> None:
        """Writes the checkpoint of `step`."""
        temporary = checkpoint.temporary_path(self._output, step)
        if self._ranks.is_main:
            checkpoint.begin(self._output, step)
            (temporary / checkpoint.CONFIG).write_text(dump_config(self._config), encoding="utf-8")
        self._engine.barrier()
        self._engine.save(temporary)
        share = checkpoint.files_of(temporary)[self._ranks.rank :: self._ranks.world_size]
        measured = self._engine.gather_over_ranks(checkpoint.measure(temporary, share))
        if self._ranks.is_main:
            record = CheckpointRecord(
                step=step,
                world_size=self._ranks.world_size,
                zero_stage=self._engine.stage,
                config_sha256=run.sha256,
                data=self._loader.state_dict(),
                progress={**asdict(work), "skipped_steps": self._engine.skipped_steps},
                run_id=run.run_id,
                versions=provenance.package_versions(),
                files={name: file for part in measured for name, file in part.items()},
            )
            checkpoint.commit(temporary, record)
            checkpoint.retain(self._output, self._settings.keep)
        self._engine.barrier()

    def resume(self) -> tuple[int, Work]:
        """Loads the newest good checkpoint; returns steps and work done before, none of both without one."""
        found = checkpoint.newest_good(self._output, self._say) if self._ranks.is_main else None
        found = self._engine.gather_over_ranks(found)[0]
        if found is None:
            return 0, Work()
        path, record = found
        self._engine.load(path)
        self._loader.load_state_dict(record.data)
        progress = dict(record.progress)
        self._engine.skipped_steps = int(progress.pop("skipped_steps"))
        self._say(f"resumed from {path} at step {record.step}")
        return record.step, Work(**progress)
