"""The training loop: resume, step, log, validate, save. Runs once on every rank of a job."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from typing import Any

import torch

from pipeline.config import ExperimentConfig, dump_config
from pipeline.config.flat import flatten
from pipeline.core import provenance
from pipeline.core.console import format_duration
from pipeline.core.ranks import Ranks
from pipeline.data.feature_set import FeatureSet
from pipeline.data.loader import evaluation_batches
from pipeline.model import count_parameters
from pipeline.tracking.writer import Status, Tracker, read_metrics
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.build import build_components, save_model, validation_questions
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.lr_schedule import lr_multiplier
from pipeline.training.run_dir import RunRecord
from pipeline.training.step_metrics import IGNORED_LABEL, TaskLosses, step_flops
from pipeline.training.throughput import THROUGHPUT_FIELDS, Throughput, ThroughputMeter, peak_flops, peak_memory_gib

MODEL, SKIPPED = "model", "skipped.jsonl"
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "segment_ids", "audio_features", "audio_lengths")
FINAL_LOSS_RECORDS = 10
Batch = dict[str, Any]


class Stopped(Exception):
    """A signal asked for the end; the run is saved and can go on."""


class Trainer:
    """One run on one rank. The process group must exist and, on rank 0, the output folder be locked.

    Args:
        config: checked before by `pipeline.train`.
        log: prints a line for the person who watches; called on rank 0 only.
        stop: set by whoever wants the run to end, saved, after the step under way.
        reshard: go on also from a checkpoint of another number of ranks.

    Raises:
        UserError: the data does not fit the config or the checkpoint.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        ranks: Ranks,
        log: Callable[[str], None],
        stop: threading.Event,
        *,
        reshard: bool = False,
    ) -> None:
        self.config, self.train, self.ranks, self.output = config, config.train, ranks, config.output
        self.log = log if ranks.is_main else lambda _: None
        self.components = build_components(config, ranks)
        self.engine, self.loader, self.total_steps = (
            self.components.engine,
            self.components.loader,
            self.components.total_steps,
        )
        self.goal = self.train.tokens or self.total_steps or 0  # in tokens or in steps
        self.throughput_meter = ThroughputMeter()
        self.peak_flops = peak_flops(self.engine.device, self.train.precision, self.train.peak_tflops)
        self.skipped_in_a_row = 0
        self.gradients_checked = False
        self.stop = stop
        origin = run_dir.identity_of(config.starts_from)
        identity = run_dir.run_identity(config, self.components.features.contract.fingerprint, origin)
        self.run = run_dir.read_run(self.output) or RunRecord(identity=identity)
        self.checkpoints = CheckpointManager(config, ranks, self.engine, self.loader, self.log, reshard=reshard)
        # Of all ranks since the run began, over resumes; `throughput` up to the last step that was logged.
        self.step, self.seen_tokens, self.throughput = self.checkpoints.resume()
        self.tracker = self._start_tracking() if ranks.is_main else None
        if self.tracker is not None and config.tracking.log_checkpoints:
            self.checkpoints.upload_to(self.tracker)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the last step; returns the figures of `train.json` on rank 0, nothing elsewhere.

        Raises:
            Stopped: a signal ended the run early.
        """
        status: Status = "FAILED"
        try:
            steps = iter(self.loader)
            self.throughput_meter.lap()
            while self.done < self.goal:
                stop = self._optimizer_step(steps)
                last = self.done >= self.goal
                evaluate = last or self._due("evaluate_every_steps")
                with self.throughput_meter.paused():
                    self.checkpoints.poll()
                    if stop or last or evaluate or self.step % self.train.checkpoint.every_steps == 0:
                        # Before validation, which might fail.
                        self.checkpoints.save(self.step, self.seen_tokens, self.throughput, self.run)
                if stop and not last:
                    self.checkpoints.require_saved()
                    status = "KILLED"
                    raise Stopped(f"stopped by a signal at step {self.step}; saved, start it again to go on")
                if evaluate and self.components.validation is not None:
                    self._validate(self.components.validation)
            self.checkpoints.require_saved()
            figures = self._export()
            status = "FINISHED"
        finally:
            if self.tracker is not None and not self.tracker.close(status):
                self.log(f"MLflow does not answer ({self.tracker.failure}): the next start sends what is missing")
        return self._write_results(figures)

    @property
    def done(self) -> int:
        """How far the run is, in what `goal` counts."""
        return self.seen_tokens if self.train.tokens else self.step

    def _optimizer_step(self, steps: Iterator[list[Batch]]) -> bool:
        """One step on one global batch; returns whether a rank was asked to stop."""
        with self.throughput_meter.waiting():
            micro_batches = next(steps)
        answer_tokens = sum(_count_answer_tokens(batch) for batch in micro_batches)
        text_tokens = sum(_count_text_tokens(batch) for batch in micro_batches)
        mine = [answer_tokens, text_tokens, self.stop.is_set()]
        total_answer_tokens, total_text_tokens, stop = self.engine.sum_over_ranks(mine)
        # Dropout depends on seed, step and rank alone, so that a resumed run draws what it would have drawn.
        torch.manual_seed(hash((self.train.seed, self.step, self.ranks.rank)) % 2**63)
        loss = torch.zeros((), device=self.engine.device)
        num_items = total_answer_tokens * self.engine.loss_share
        step, seen_tokens = self.step + 1, self.seen_tokens + int(total_text_tokens)
        last = (seen_tokens if self.train.tokens else step) >= self.goal
        tasks = TaskLosses(self.loader.tasks) if step % self.train.log_every_steps == 0 or step == 1 or last else None
        for number, batch in enumerate(micro_batches, start=1):
            on_output = None if tasks is None else partial(_add_losses, tasks, batch)
            inputs = self._inputs(batch, num_items)
            loss += self.engine.backward(inputs, last=number == len(micro_batches), on_output=on_output)
            self.throughput_meter.count(len(batch["question_ids"]), _count_text_tokens(batch), sum(batch["audio_s"]))
        if not self.gradients_checked:
            self._check_gradients(micro_batches)
        self.step, self.seen_tokens = step, seen_tokens
        schedule = self.train.warmup_fraction, self.train.final_learning_rate_fraction
        factor = lr_multiplier(self.done, self.goal, *schedule)
        applied = self.engine.step(factor)
        if tasks is not None or not applied:
            self._log_step(loss, factor, micro_batches, tasks or TaskLosses([]))
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            self._note_skipped(micro_batches)
        return stop > 0

    def _check_gradients(self, micro_batches: list[Batch]) -> None:
        """Ends a run, at its first step with audio, in which a side of the model would never learn."""
        (clips,) = self.engine.sum_over_ranks([sum(len(batch["clip_ids"]) for batch in micro_batches)])
        self.gradients_checked = clips > 0
        silent = self.engine.groups_without_gradient() if clips else []
        # By side, not by group: behind the closed gates of `flamingo` only the gates get a gradient at first.
        reached = {group.name.partition(".")[0] for group in self.engine.groups if group.name not in silent}
        for side in {name.partition(".")[0] for name in silent} - reached:
            raise RuntimeError(f"no gradient reaches {side}, which is trained: it would never change")

    def _due(self, setting: str) -> bool:
        every_steps = getattr(self.train, setting)
        return every_steps is not None and self.step % every_steps == 0

    def inputs_of_step(self, micro_batches: list[Batch]) -> list[Batch]:
        """What the model is called with in one optimizer step, for a caller that steps the engine itself."""
        (answer_tokens,) = self.engine.sum_over_ranks([sum(map(_count_answer_tokens, micro_batches))])
        return [self._inputs(batch, answer_tokens * self.engine.loss_share) for batch in micro_batches]

    def _inputs(self, batch: Batch, num_items: float) -> Batch:
        features = batch["audio_features"].items()
        on_device = {name: frames.to(self.engine.device, non_blocking=True) for name, frames in features}
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        return {**inputs, "audio_features": on_device, "num_items_in_batch": num_items}

    def _validate(self, features: FeatureSet) -> None:
        """Records the mean loss of an answer token on held-out questions."""
        with self.throughput_meter.paused(), self.engine.evaluating():
            batches = evaluation_batches(
                features,
                self.components.chat,
                validation_questions(features, self.config),
                self.train,
                self.ranks,
                self.components.audio_positions,
            )
            loss = torch.zeros((), device=self.engine.device, dtype=torch.float64)
            answer_tokens = 0
            for batch in batches:
                loss += self.engine.forward(self._inputs(batch, 1.0))
                answer_tokens += _count_answer_tokens(batch)
            total_loss, total_tokens = self.engine.sum_over_ranks([float(loss), answer_tokens])
        self._record({"validation/loss": total_loss / total_tokens})
        self.checkpoints.note_validation(self.step, total_loss / total_tokens)
        self.log(f"{self._where}  validation loss {total_loss / total_tokens:.4f}")

    # ---- what is told ---------------------------------------------------------------------------------------------

    def _log_step(self, loss: torch.Tensor, factor: float, micro_batches: list[Batch], tasks: TaskLosses) -> None:
        text_tokens = sum(map(_count_text_tokens, micro_batches))
        flops = step_flops(self.components.model.config, micro_batches, self.train.trainable) if self.peak_flops else 0
        mine = [
            float(loss) * self.engine.loss_share,
            text_tokens,
            flops,
            *tasks.to_list(),
            *astuple(self.throughput_meter.lap()),
        ]
        mean_loss, step_tokens, step_operations, *others = self.engine.sum_over_ranks(mine)
        throughput = Throughput(*others[-len(THROUGHPUT_FIELDS) :])
        rates = throughput.rates(self.ranks.world_size)
        self.throughput += throughput
        if self.peak_flops is not None:
            # Of all steps since the last one that was logged, if they cost as much a token as this one.
            operations = step_operations * throughput.text_tokens / step_tokens
            rates["mfu"] = operations / (throughput.elapsed_s * self.peak_flops)
        norm = float(self.engine.gradient_norm)
        self._record(
            {
                "train/loss": mean_loss,
                **{f"train/{name}": value for name, value in tasks.metrics(others).items()},
                "train/gradient_norm": norm,
                "train/skipped_steps": self.engine.skipped_steps,
                "train/peak_memory_gib": peak_memory_gib(self.engine.device),
                **{f"train/learning_rate/{g.name}": g.learning_rate * factor for g in self.engine.groups},
                **{f"train/{name}": value for name, value in rates.items()},
            }
        )
        elapsed_s = self.throughput.elapsed_s / self.ranks.world_size
        self.log(
            f"{self._where}  loss {mean_loss:7.4f}  "
            f"lr {self.train.learning_rate * factor:.2e}  grad {norm:6.3f}  "
            f"{rates['samples_per_s']:7.1f} questions/s  wait {rates['data_wait_fraction']:4.0%}  "
            + (f"mfu {rates['mfu']:4.0%}  " if "mfu" in rates else "")
            + f"{format_duration(elapsed_s * max(0, self.goal - self.done) / self.done)} left"
        )

    @property
    def _where(self) -> str:
        share = f"/{self.total_steps}" if self.total_steps else f" ({self.done / self.goal:.1%})"
        return f"step {self.step:>6}{share}"

    def _note_skipped(self, micro_batches: list[Batch]) -> None:
        """Writes down what was in a step whose gradient was not finite; too many in a row end the run."""
        mine = {name: [i for batch in micro_batches for i in batch[name]] for name in ("question_ids", "clip_ids")}
        by_rank = self.engine.gather_over_ranks(mine)
        file = self.output / SKIPPED
        if self.ranks.is_main:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": self.step, "by_rank": by_rank}) + "\n")
        self.log(f"{self._where}  skipped: the gradient is not finite (batch in {file})")
        if self.skipped_in_a_row >= self.train.max_skipped_steps:
            fault = f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite"
            raise RuntimeError(f"{fault}; their batches are in {file}")

    def _record(self, metrics: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.step, metrics)

    def _start_tracking(self) -> Tracker:
        run_dir.write_run(self.output, self.run)
        resolved = dump_config(self.config)
        (self.output / run_dir.CONFIG).write_text(resolved, encoding="utf-8")
        streams = self.components.model.config.stream_specs()
        return Tracker(
            self.config.tracking,
            self.output,
            run_id=self.run.run_id,
            params={
                **flatten(self.config.model_dump(mode="json")),
                "resolved.steps": self.total_steps,
                **{f"resolved.{kind}_parameters": n for kind, n in count_parameters(self.components.model).items()},
                "resolved.audio_layers": [list(stream.audio_layers) for stream in streams],
                "resolved.world_size": self.ranks.world_size,
            },
            tags={
                "pal.kind": "train",
                "pal.integration": self.config.model.integration,
                **self.config.tracking.tags,
                "pal.features": self.components.features.contract.fingerprint,
                **provenance.git_state(),
                **{f"version.{name}": version for name, version in provenance.package_versions().items()},
            },
            artifacts={
                run_dir.CONFIG: resolved,
                "deepspeed.json": json.dumps(self.components.deepspeed_config, indent=2),
            },
            on_run_id=self._keep_run_id,
        )

    def _keep_run_id(self, run_id: str) -> None:
        if run_id != self.run.run_id:
            self.run = self.run.model_copy(update={"run_id": run_id})
            run_dir.write_run(self.output, self.run)

    # ---- what is kept ---------------------------------------------------------------------------------------------

    def _export(self) -> dict[str, float]:
        """Writes the trained model for evaluation; returns the figures of the run."""
        peaks = self.engine.gather_over_ranks(peak_memory_gib(self.engine.device))
        state = self.engine.gathered_state()
        if state is None:
            return {}
        save_model(self.components.model, self.components.tokenizer, self.config, self.output / MODEL, state)
        losses = [metrics["train/loss"] for _, metrics in read_metrics(self.output) if "train/loss" in metrics]
        figures = {
            "final_loss": statistics.fmean(losses[-FINAL_LOSS_RECORDS:]),
            **self.throughput.rates(self.ranks.world_size),
            "peak_memory_gib": max(peaks),
            "text_tokens": self.seen_tokens,
        }
        self._record(figures)
        return figures

    def _write_results(self, figures: dict[str, float]) -> dict[str, Any]:
        if not self.ranks.is_main:
            return {}
        newest = str(checkpoint_dir.list_checkpoints(self.output)[0])
        results = {"steps": self.step, **figures, "run_id": self.run.run_id, "checkpoint": newest}
        (self.output / run_dir.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return results


def _add_losses(tasks: TaskLosses, batch: Batch, output: Any) -> None:
    tasks.add(batch, output.token_losses, output.target_tokens)


def _count_text_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum()) - len(batch["clip_ids"])


def _count_answer_tokens(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED_LABEL).sum())
