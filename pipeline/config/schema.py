"""The config tree of one experiment. Each setting is declared once, here or in `model.py`. Reads no file and does not
import torch."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Location, NonNegativeInt, PositiveInt, Probability
from pipeline.config.loading import InvalidConfig
from pipeline.config.model import ModelConfig
from pipeline.core.errors import UserError
from pipeline.core.records import Strict


def _refuse_password(key: str, location: str | None) -> None:
    if location is not None and re.search(r"://[^/@\s]*:[^/@\s]*@", location):
        raise InvalidConfig(key, "holds a password, which would be logged", "use environment variables for it")


class MixtureConfig(Strict):
    """Further questions, mixed into those of `data.train` at a fixed share.

    Attributes:
        path: feature set of the questions, with the same features as `data.train`, or with none if the questions refer
            to no clip; None means `data.train` itself, for another selection of its questions.
        tasks, datasets: tasks and datasets whose questions are used; None uses all.
        share: share of all sequences; to reach it, these questions are repeated or left for later epochs.
    """

    path: Location | None = None
    tasks: list[str] | None = None
    datasets: list[str] | None = None
    share: Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Strict):
    """The data of an experiment, and how a question becomes a conversation.

    Attributes:
        train, validation: prepared feature sets, which are folders with a `features.json` or URLs of an object store.
        cache: folder on a local disk for copies of remote shards (an object store, a network disk), shared by the
            ranks of a node and by later jobs; None reads the sets in place.
        cache_gib: approximate limit for the copies of each feature column; None means no limit. It should exceed the
            features of shuffle_block_clips clips.
        system_prompt: text before the audio; empty for none, null for the default of the chat template.
        tasks, datasets: tasks and datasets whose questions are used; None uses all. Also selects validation questions.
        mixture: further questions to train on. An epoch remains one pass over the questions of `train`.
        questions_per_sequence: number of questions about one clip that share its audio in one sequence; 1 is the common
            practice, in which each question has its own copy of the audio.
        shuffle_block_clips: clips are shuffled within blocks of this many, so that each remote shard is read once.
        max_text_tokens: longest conversation; a longer one is unfit and never truncated.
        unfit_questions: what happens to selected questions that cannot be trained on (longer than max_text_tokens or
            than the language model's positions, with a text that the tokenizer or the template cannot hold, or with an
            answer that is none of the choices), all of which are found before the first step: they are left out and
            listed in `unfit.jsonl` of the output folder (`skip`), or the first one is an error (`error`).
        max_unfit_fraction: largest fraction of unfit questions in a selection with which a run starts.
        validation_questions: number of questions, spread over the set, for the validation loss.
        workers: data loader processes of each rank; 0 loads in the rank itself.
    """

    train: Location
    validation: Location | None = None
    cache: Path | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    system_prompt: str | None = "You listen to audio and answer questions about it."
    tasks: list[str] | None = None
    datasets: list[str] | None = None
    mixture: list[MixtureConfig] = []
    questions_per_sequence: PositiveInt = 1
    shuffle_block_clips: PositiveInt = 65536
    max_text_tokens: PositiveInt = 1024
    unfit_questions: Literal["skip", "error"] = "skip"
    max_unfit_fraction: Probability = 0.01
    validation_questions: PositiveInt = 1024
    workers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        locations = [("data.train", self.train), ("data.validation", self.validation)]
        locations += [(f"data.mixture.{number}.path", part.path) for number, part in enumerate(self.mixture)]
        for key, location in locations:
            _refuse_password(key, location)
            if location is not None and "://" in location and self.cache is None:
                raise InvalidConfig(key, "is in an object store, but data.cache is not set", "set it to a local folder")
        if self.cache_gib is not None and self.cache is None:
            raise InvalidConfig("data.cache_gib", "has no effect without data.cache", "set both or neither")
        if sum(part.share for part in self.mixture) >= 1:
            raise InvalidConfig("data.mixture", "its shares leave nothing for data.train", "let them sum to below 1")
        return self


class CheckpointConfig(Strict):
    """When checkpoints are written and how many are kept.

    Attributes:
        every_steps: number of steps between two checkpoints. One is also saved before each validation, and at the end.
        keep: number of the newest checkpoints to keep. While one is written, the disk holds one more.
        keep_best: number of further checkpoints to keep, those with the lowest validation loss.
        background: write while training continues; each rank then holds a second copy of its part in host memory.
    """

    every_steps: PositiveInt = 500
    keep: PositiveInt = 2
    keep_best: NonNegativeInt = 0
    background: bool = True


class LoraConfig(Strict):
    """Low-rank adapters that are trained instead of the language model's own weights (through `peft`)."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Probability = 0.0
    target_modules: list[str] = ["q_proj", "v_proj"]


LENGTHS = ("steps", "epochs", "tokens")  # settings of `train` that limit its length


class TrainConfig(Strict):
    """The optimisation: batch sizes, learning rates, precision, length.

    Attributes:
        trainable: `connector` (all audio parameters are trained, the language model is frozen), `all_but_ffn`, `all`.
        lora: adapters of a frozen language model; None trains without adapters.
        steps, epochs, tokens: length of the training, by exactly one of them. An epoch visits every selected question
            once. Tokens are text tokens over all ranks; the learning rate then follows the share of them that was seen.
        global_batch_size: questions per optimizer step over all ranks.
        micro_batch_size: largest number of sequences per rank and forward pass. A rank with fewer sequences per step,
            or with a number that it does not divide, has a smaller last pass: one config runs on any number of ranks
            that divides the global batch.
        micro_batch_tokens: positions per rank and forward pass, including padding: text and, as far as the lengths of
            clips determine it, audio in the sequence. Long sequences then form smaller micro-batches, and the number of
            passes per step varies.
        warmup_fraction: share of the steps in which the learning rate rises linearly, before the cosine decay.
        compile: let torch compile the language model's feed-forward layers, which takes a minute at the start and saves
            passes over memory; not under ZeRO-3.
        loss_on: tokens that carry loss: those of answers (`answer`), or all text (`all_text`).
        zero: name of a file in `ds_configs/`, or a path to one; it holds ZeRO policy only.
        collective_timeout_s: how long a rank waits for another one before it ends the job.
        peak_tflops: peak of one device at this precision, for the model FLOP/s utilisation; None looks it up by the
            name of the device, and reports no utilisation for an unknown one.
        max_skipped_steps: number of consecutive steps with a gradient that is not finite after which the job ends;
            fewer of them are skipped.
    """

    trainable: Literal["connector", "all_but_ffn", "all"] = "all"
    lora: LoraConfig | None = None
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: PositiveInt | None = None
    global_batch_size: PositiveInt = 256
    micro_batch_size: PositiveInt = 8
    micro_batch_tokens: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    connector_learning_rate: Annotated[float, Field(gt=0)] | None = None
    final_learning_rate_fraction: Probability = 0.1
    warmup_fraction: Probability = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.95
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    loss_on: Literal["answer", "all_text"] = "answer"
    seed: NonNegativeInt = 0
    zero: str = "zero2"
    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt | None = None
    collective_timeout_s: PositiveInt = 1800
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    max_skipped_steps: PositiveInt = 10
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if sum(getattr(self, name) is not None for name in LENGTHS) > 1:
            raise InvalidConfig(
                "train.steps", f"is one of {', '.join(LENGTHS)}, which exclude each other", "give exactly one"
            )
        if self.lora is not None and self.trainable != "connector":
            raise InvalidConfig(
                "train.lora",
                f"adapts a frozen language model, but trainable is '{self.trainable}'",
                "set trainable to connector",
            )
        return self


def default_tracking_uri(output: Path) -> str:
    """Returns MLFLOW_TRACKING_URI, or the URI of an sqlite file beside the output folder."""
    # SQLAlchemy decodes the path and ends it at a question mark.
    path = str(output.absolute().parent / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


class TrackingConfig(Strict):
    """Where MLflow records the run.

    Attributes:
        uri: MLflow tracking URI without a password. MLflow reads the password from MLFLOW_TRACKING_USERNAME and
            MLFLOW_TRACKING_PASSWORD, a database from its own variables. None means MLFLOW_TRACKING_URI; if that is
            not set either, an sqlite file beside the output folder, `sqlite:///<output>/../mlflow.db`.
        experiment: name of the MLflow experiment.
        run_name: name of the run; None means the name of the output folder.
        tags: further tags of the run.
        log_checkpoints: upload each checkpoint as an artifact of the run.
    """

    uri: str | None = None
    experiment: str = "pal"
    run_name: str | None = None
    tags: dict[str, str] = {}
    log_checkpoints: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrackingConfig:
        _refuse_password("tracking.uri", self.uri)
        return self


class StageConfig(Strict):
    """One stage of a curriculum: the settings of `data` and `train` that it overrides."""

    data: dict[str, Any] = {}
    train: dict[str, Any] = {}


class ExperimentConfig(Strict):
    """One training run, or the stages of a curriculum.

    Attributes:
        output: folder for checkpoints, metrics and the resolved config; each stage has a folder of its own in it.
        starts_from: output folder of a finished run. This run starts from the weights trained there and in the runs
            that it started from itself.
        stages: stages by name, run in order, each from the weights trained by those before it; see `curriculum`.
    """

    output: Path
    starts_from: Path | None = None
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    stages: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], StageConfig] = {}

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        if not self.stages and all(getattr(self.train, name) is None for name in LENGTHS):
            raise InvalidConfig("train.steps", f"needs exactly one of {', '.join(LENGTHS)}", "give exactly one")
        if self.train.checkpoint.keep_best and self.data.validation is None:
            raise InvalidConfig("train.checkpoint.keep_best", "has no effect without data.validation", "set both")
        if self.model.text_only and not self.stages:
            self._refuse_audio_settings()
        return self

    def _refuse_audio_settings(self) -> None:
        """Refuses settings of the audio side in a run on text alone."""
        if self.train.trainable == "connector":
            raise InvalidConfig(
                "train.trainable",
                "is connector, and a model without encoders has none",
                "set it to all or all_but_ffn, and remove train.lora",
            )
        if self.train.connector_learning_rate is not None:
            raise InvalidConfig(
                "train.connector_learning_rate", "has no effect on a model without encoders", "remove it"
            )

    def rows_per_rank(self, world_size: int) -> int:
        """Returns the number of sequences per rank and optimizer step.

        Raises:
            UserError: the global batch is not divisible.
        """
        unit = self.data.questions_per_sequence * world_size
        rows, remainder = divmod(self.train.global_batch_size, unit)
        if remainder:
            raise UserError(
                "train.global_batch_size",
                f"{self.train.global_batch_size} questions are not divisible by questions_per_sequence "
                f"{self.data.questions_per_sequence} x {world_size} ranks = {unit}",
                f"use a multiple of {unit}",
            )
        return rows

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Returns the number of micro-batches per rank and optimizer step; with `micro_batch_tokens`, the lowest one.

        Raises:
            UserError: the global batch is not divisible.
        """
        return math.ceil(self.rows_per_rank(world_size) / self.train.micro_batch_size)
