"""Finds the clips that kill their workers, by retrying a partition and then its clips one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_prep.job.errors import PreparationFailed


@dataclass
class PartitionTask:
    """A partition that is not committed yet, and the search for the clips that kill its workers.

    Attributes:
        partition: index of the partition.
        clips: number of its clips.
        position: clips before it were encoded in the last attempt that died.
        worker_deaths: consecutive deaths of workers at this position.
        probe: position of the clip that is tried alone next; None when not searching.
        attempts: worker deaths by position of the clip that was tried alone.
        poison_clips: position of each rejected clip -> detail of the reason.
    """

    partition: int
    clips: int
    position: int = 0
    worker_deaths: int = 0
    probe: int | None = None
    attempts: dict[int, int] = field(default_factory=dict)
    poison_clips: dict[int, str] = field(default_factory=dict)

    def on_progress(self, position: int) -> None:
        """Records that clips before `position` are encoded."""
        if position > self.position:
            self.position, self.worker_deaths = position, 0

    def on_probe_success(self) -> None:
        """Moves on to the next clip, or back to the whole partition after the last one."""
        assert self.probe is not None
        self._probe_from(self.probe + 1)

    def on_worker_death(self, max_attempts: int) -> None:
        """Decides how to retry.

        The first death only leads to another attempt, because machines can be lost. After the second one at the same
        position, the clips from there on are tried alone, until one of them kills its worker `max_attempts` times.

        Raises:
            PreparationFailed: the partition kills its worker although each clip alone does not.
        """
        if self.probe is not None:
            self.attempts[self.probe] = self.attempts.get(self.probe, 0) + 1
            if self.attempts[self.probe] >= max_attempts:
                self.poison_clips[self.probe] = f"killed its worker in {max_attempts} of {max_attempts} attempts"
                self.probe, self.worker_deaths = None, 0
            return
        self.worker_deaths += 1
        if self.worker_deaths >= 2:
            self._probe_from(self.position)
        if self.worker_deaths >= 2 + max_attempts:
            raise PreparationFailed(
                f"partition {self.partition} kills its worker near clip {self.position} although each clip alone does "
                "not, probably because it runs out of memory: lower batch_s"
            )

    def _probe_from(self, position: int) -> None:
        self.probe = position if position < self.clips else None
