"""The training loop: resume, step, log, validate, save. Runs once on every rank of a job."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch

from pipeline.config import ExperimentConfig
from pipeline.core.console import logger
from pipeline.core.ranks import Ranks
from pipeline.data.feature_set import FeatureSet
from pipeline.engine import ParameterGroup
from pipeline.tracking.writer import Status
from pipeline.training import checkpoint_dir, run_dir
from pipeline.training.batches import Batch, count_answer_tokens, count_text_tokens, model_inputs
from pipeline.training.build import build_components
from pipeline.training.checkpoint_manager import CheckpointManager
from pipeline.training.dropout_seed import dropout_seed
from pipeline.training.exported_model import save_model
from pipeline.training.lr_schedule import lr_multiplier
from pipeline.training.run_dir import RunRecord
from pipeline.training.run_tracking import start_tracker
from pipeline.training.step_metrics import TaskLosses, step_flops
from pipeline.training.throughput import (
    THROUGHPUT_FIELDS,
    Throughput,
    ThroughputMeter,
    TimeLeft,
    peak_flops,
    peak_memory_gib,
)
from pipeline.training.validation import validation_loss

MODEL, SKIPPED = "model", "skipped.jsonl"
FINAL_LOSS_RECORDS = 10


class Stopped(Exception):
    """A signal requested the end of the run, which is saved and can be resumed."""


class Trainer:
    """One run on one rank. The process group must exist and, on rank 0, the output folder be locked.

    Args:
        config: config that `preflight.check` accepted.
        ranks: rank of this process and number of ranks.
        stop: event that ends the run after the current step, once it is saved.
        reshard: resume from a checkpoint of another number of ranks too.

    Raises:
        UserError: the data does not match the config or the checkpoint.
    """

    def __init__(self, config: ExperimentConfig, ranks: Ranks, stop: threading.Event, *, reshard: bool = False) -> None:
        self.config, self.train, self.ranks, self.output = config, config.train, ranks, config.output
        self.components = build_components(config, ranks)
        self.engine, self.loader = self.components.engine, self.components.loader
        self.total_steps = self.components.total_steps
        self.goal = self.train.tokens or self.total_steps or 0  # in tokens or in steps
        self.throughput_meter, self.time_left = ThroughputMeter(), TimeLeft()
        self.peak_flops = peak_flops(self.engine.device, self.train.precision, self.train.peak_tflops)
        self.skipped_in_a_row = 0
        self.gradients_checked = False
        self.stop = stop
        origin = run_dir.identity_of(config.starts_from)
        identity = run_dir.run_identity(config, self.components.features.contract.fingerprint, origin)
        self.run = run_dir.read_run(self.output) or RunRecord(identity=identity)
        self.checkpoints = CheckpointManager(config, ranks, self.engine, self.loader, reshard=reshard)
        # Sums over all ranks since the run began, across resumes; `throughput` up to the last logged step.
        self.step, self.seen_tokens, self.throughput = self.checkpoints.resume()
        self.tracker = None
        if ranks.is_main:
            self.tracker = start_tracker(
                config, self.components, self.run, self._keep_run_id, world_size=ranks.world_size
            )
        if self.tracker is not None and config.tracking.log_checkpoints:
            self.checkpoints.upload_to(self.tracker)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the last step; returns the results of `train.json` on rank 0, an empty dictionary elsewhere.

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
                evaluate = last or self._is_due(self.train.evaluate_every_steps)
                with self.throughput_meter.paused():
                    self.checkpoints.poll()
                    if stop or last or evaluate or self._is_due(self.train.checkpoint.every_steps):
                        # Saves before validation, which might fail.
                        self.checkpoints.save(self.step, self.seen_tokens, self.throughput, self.run)
                if stop and not last:
                    self.checkpoints.require_saved()
                    status = "KILLED"
                    raise Stopped(
                        f"stopped by a signal at step {self.step}; checkpoint saved; rerun the same command to resume"
                    )
                if evaluate and self.components.validation is not None:
                    self._validate(self.components.validation)
            self.checkpoints.require_saved()
            results = self._export()
            status = "FINISHED"
        finally:
            if self.tracker is not None and not self.tracker.close(status):
                logger.warning(f"{self.tracker.failure}; the next start sends what is missing")
        return self._write_results(results)

    @property
    def done(self) -> int:
        """Progress of the run, in the unit of `goal`."""
        return self.seen_tokens if self.train.tokens else self.step

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0

    def _optimizer_step(self, steps: Iterator[list[Batch]]) -> bool:
        """Takes one optimizer step on one global batch; returns whether a signal reached any rank."""
        with self.throughput_meter.waiting():
            micro_batches = next(steps)
        counts = [sum(map(count_answer_tokens, micro_batches)), sum(map(count_text_tokens, micro_batches))]
        answer_tokens, text_tokens, stop = self.engine.sum_over_ranks([*counts, self.stop.is_set()])
        step, seen_tokens = self.step + 1, self.seen_tokens + int(text_tokens)
        tasks = TaskLosses(self.loader.tasks) if self._is_logged(step, seen_tokens) else None
        loss = self._backward(micro_batches, answer_tokens * self.engine.loss_share, tasks)
        if not self.gradients_checked:
            self._check_gradients(micro_batches)
        self.step, self.seen_tokens = step, seen_tokens
        schedule = self.train.warmup_fraction, self.train.final_learning_rate_fraction
        multiplier = lr_multiplier(self.done, self.goal, *schedule)
        applied = self.engine.step(multiplier)
        if tasks is not None or not applied:
            self._log_step(loss, multiplier, micro_batches, tasks or TaskLosses([]))
        self.time_left.begin(self.done, self.throughput_meter.elapsed_s)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            self._log_skipped(micro_batches)
        return stop > 0

    def _backward(self, micro_batches: list[Batch], num_items: float, tasks: TaskLosses | None) -> torch.Tensor:
        """Accumulates the gradients of this rank's micro-batches; returns the sum of their losses, on the device."""
        torch.manual_seed(dropout_seed(self.train.seed, self.step, self.ranks.rank))
        loss = torch.zeros((), device=self.engine.device)
        for number, batch in enumerate(micro_batches, start=1):
            on_output = None if tasks is None else partial(_add_losses, tasks, batch)
            inputs = model_inputs(batch, num_items, self.engine.device)
            loss += self.engine.backward(inputs, last=number == len(micro_batches), on_output=on_output)
            self.throughput_meter.count(len(batch["question_ids"]), count_text_tokens(batch), sum(batch["audio_s"]))
        return loss

    def _check_gradients(self, micro_batches: list[Batch]) -> None:
        """Ends a run, at its first step with audio, if no gradient reaches a part of the model that is trained.

        A model without encoders is checked at its first step.
        """
        (clips,) = self.engine.sum_over_ranks([sum(len(batch["clip_ids"]) for batch in micro_batches)])
        self.gradients_checked = clips > 0 or self.config.model.text_only
        without_gradient = self.engine.groups_without_gradient() if self.gradients_checked else []
        # By side, not by group: behind the closed gates of `flamingo` only the gates get a gradient at first.
        reached = {group.name.partition(".")[0] for group in self.engine.groups if group.name not in without_gradient}
        for side in {name.partition(".")[0] for name in without_gradient} - reached:
            raise RuntimeError(f"no gradient reaches {side}, which is trained: it would never change")

    def inputs_of_step(self, micro_batches: list[Batch]) -> list[Batch]:
        """Returns the model's inputs in one optimizer step, for a caller that steps the engine itself."""
        (answer_tokens,) = self.engine.sum_over_ranks([sum(map(count_answer_tokens, micro_batches))])
        num_items = answer_tokens * self.engine.loss_share
        return [model_inputs(batch, num_items, self.engine.device) for batch in micro_batches]

    def _validate(self, features: FeatureSet) -> None:
        """Records the mean loss of an answer token on held-out questions."""
        with self.throughput_meter.paused():
            loss = validation_loss(self.components, features, self.config, self.ranks)
        self._record({"validation/loss": loss})
        self.checkpoints.record_validation_loss(self.step, loss)
        logger.info(f"{self._position}  validation loss {loss:.4f}")

    # ---- reporting ------------------------------------------------------------------------------------------------

    def _is_logged(self, step: int, seen_tokens: int) -> bool:
        last = (seen_tokens if self.train.tokens else step) >= self.goal
        return step % self.train.log_every_steps == 0 or step == 1 or last

    def _log_step(self, loss: torch.Tensor, multiplier: float, micro_batches: list[Batch], tasks: TaskLosses) -> None:
        text_tokens = sum(map(count_text_tokens, micro_batches))
        flops = step_flops(self.components.model.config, micro_batches, self.train.trainable) if self.peak_flops else 0
        rank_metrics = [
            float(loss) * self.engine.loss_share,
            text_tokens,
            flops,
            *tasks.to_list(),
            *astuple(self.throughput_meter.lap()),
        ]
        mean_loss, step_tokens, total_flops, *totals = self.engine.sum_over_ranks(rank_metrics)
        throughput = Throughput(*totals[-len(THROUGHPUT_FIELDS) :])
        rates = throughput.rates(self.ranks.world_size)
        self.throughput += throughput
        if self.peak_flops is not None:
            # FLOPs since the last logged step, on the assumption that each token costs as much as in this step.
            lap_flops = total_flops * throughput.text_tokens / step_tokens
            rates["mfu"] = lap_flops / (throughput.elapsed_s * self.peak_flops)
        norm = float(self.engine.gradient_norm)
        self._record(
            {
                "train/loss": mean_loss,
                **{f"train/{name}": value for name, value in tasks.metrics(totals).items()},
                "train/gradient_norm": norm,
                "train/skipped_steps": self.engine.skipped_steps,
                "train/peak_memory_gib": peak_memory_gib(self.engine.device),
                **{f"train/learning_rate/{g.name}": g.learning_rate * multiplier for g in self.engine.groups},
                **{f"train/{name}": value for name, value in rates.items()},
            }
        )
        logger.info(
            f"{self._position}  loss {mean_loss:7.4f}  "
            f"lr {format_rates(self.engine.groups, multiplier)}  grad {norm:6.3f}  "
            f"{rates['samples_per_s']:7.1f} questions/s  wait {rates['data_wait_fraction']:4.0%}  "
            + (f"mfu {rates['mfu']:4.0%}  " if "mfu" in rates else "")
            + self.time_left.estimate(self.done, self.goal, self.throughput_meter.elapsed_s)
        )

    @property
    def _position(self) -> str:
        share = f"/{self.total_steps}" if self.total_steps else f" ({self.done / self.goal:.1%})"
        return f"step {self.step:>6}{share}"

    def _log_skipped(self, micro_batches: list[Batch]) -> None:
        """Records the batch of a step whose gradient was not finite; too many in a row end the run."""
        ids = {name: [i for batch in micro_batches for i in batch[name]] for name in ("question_ids", "clip_ids")}
        by_rank = self.engine.gather_over_ranks(ids)
        path = self.output / SKIPPED
        if self.ranks.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, "by_rank": by_rank}) + "\n")
            logger.warning(f"{self._position}  skipped: the gradient is not finite (batch in {path})")
        if self.skipped_in_a_row >= self.train.max_skipped_steps:
            fault = f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite"
            raise RuntimeError(f"{fault}; their batches are in {path}")

    def _record(self, metrics: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.step, metrics)

    def _keep_run_id(self, run_id: str) -> None:
        if run_id != self.run.run_id:
            self.run = self.run.model_copy(update={"run_id": run_id})
            run_dir.write_run(self.output, self.run)

    # ---- results --------------------------------------------------------------------------------------------------

    def _export(self) -> dict[str, float]:
        """Writes the trained model for evaluation; returns the results of the run."""
        peaks = self.engine.gather_over_ranks(peak_memory_gib(self.engine.device))
        state = self.engine.gathered_state()
        if state is None or self.tracker is None:
            return {}
        save_model(self.components.model, self.components.tokenizer, self.config, self.output / MODEL, state)
        losses = [metrics["train/loss"] for _, metrics in self.tracker.read_metrics() if "train/loss" in metrics]
        results = {
            "final_loss": statistics.fmean(losses[-FINAL_LOSS_RECORDS:]),
            **self.throughput.rates(self.ranks.world_size),
            "peak_memory_gib": max(peaks),
            "text_tokens": self.seen_tokens,
            "unfit_questions": self.components.sets.num_unfit,
        }
        self._record(results)
        return results

    def _write_results(self, metrics: dict[str, float]) -> dict[str, Any]:
        if not self.ranks.is_main:
            return {}
        newest = str(checkpoint_dir.list_checkpoints(self.output)[0])
        results = {"steps": self.step, **metrics, "run_id": self.run.run_id, "checkpoint": newest}
        (self.output / run_dir.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return results


def format_rates(groups: Sequence[ParameterGroup], lr_multiplier: float) -> str:
    """Returns the current learning rates of what is trained, each once."""
    rates = dict.fromkeys(group.learning_rate * lr_multiplier for group in groups)
    return "/".join(f"{rate:.2e}" for rate in rates)


def _add_losses(tasks: TaskLosses, batch: Batch, output: Any) -> None:
    tasks.add(batch, output.token_losses, output.target_tokens)
