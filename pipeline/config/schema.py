"""The config tree of one experiment. Each number has its one owner here and in `model.py`; no file is read and no
torch imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Location, NonNegativeInt, PositiveInt, Probability
from pipeline.config.loading import InvalidConfig, Strict
from pipeline.config.model import ModelConfig
from pipeline.core.errors import UserError


def _refuse_password(key: str, place: str | None) -> None:
    if place is not None and re.search(r"://[^/@\s]*:[^/@\s]*@", place):
        raise InvalidConfig(key, "holds a password, which would be logged", "give it by environment variables")


class MixtureConfig(Strict):
    """Further questions, mixed into those of `data.train` at a fixed share.

    Attributes:
        path: their feature set, with the same features as `data.train` or, for questions about no clip, with none at
            all; None means `data.train` itself, for another selection of its questions.
        tasks, datasets: keep only questions of these; None keeps all.
        share: of all sequences; these questions repeat, or wait for later epochs, as it demands.
    """

    path: Location | None = None
    tasks: list[str] | None = None
    datasets: list[str] | None = None
    share: Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Strict):
    """What is read and how a question becomes a conversation.

    Attributes:
        train, validation: prepared feature sets: folders that hold a `features.json`, or URLs of an object store.
        cache: folder on a local disk for copies of shards that lie far away (an object store, a network disk); shared
            by the ranks of a node and by later jobs. None reads the sets in place.
        cache_gib: the copies of each feature column take about this much at most; None means no limit. Best larger
            than the features of shuffle_block_clips clips.
        system_prompt: text before the audio; empty for none.
        tasks, datasets: keep only questions of these; None keeps all. They also choose the validation questions.
        mixture: what else is trained on. An epoch remains one time through the questions of `train`.
        questions_per_sequence: questions of one clip packed into one sequence that shares its audio; 1 is the
            common practice, one question with its own copy of the audio.
        shuffle_block_clips: clips are shuffled inside blocks of this many, so that a remote shard is read once.
        max_text_tokens: longer conversations are an error, never cut silently.
        validation_questions: the validation loss is taken on this many questions, spread over the set.
    """

    train: Location
    validation: Location | None = None
    cache: Path | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None
    system_prompt: str = "You listen to audio and answer questions about it."
    tasks: list[str] | None = None
    datasets: list[str] | None = None
    mixture: list[MixtureConfig] = []
    questions_per_sequence: PositiveInt = 1
    shuffle_block_clips: PositiveInt = 65536
    max_text_tokens: PositiveInt = 1024
    validation_questions: PositiveInt = 1024
    workers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        places = [("data.train", self.train), ("data.validation", self.validation)]
        places += [(f"data.mixture.{number}.path", other.path) for number, other in enumerate(self.mixture)]
        for key, place in places:
            _refuse_password(key, place)
            if place is not None and "://" in place and self.cache is None:
                raise InvalidConfig(key, "is in an object store and there is no data.cache", "set it to a local folder")
        if self.cache_gib is not None and self.cache is None:
            raise InvalidConfig("data.cache_gib", "has no effect without data.cache", "set both or none")
        if sum(other.share for other in self.mixture) >= 1:
            raise InvalidConfig("data.mixture", "its shares leave nothing for data.train", "make them sum to below 1")
        return self


class CheckpointConfig(Strict):
    """When a checkpoint is written and how many stay.

    Attributes:
        keep: the newest ones. While one is written, the disk holds one more.
        keep_best: further ones, those of the lowest validation loss.
        background: write while training goes on; each rank then holds a second copy of its part in host memory.
    """

    every_steps: PositiveInt = 500
    keep: PositiveInt = 2
    keep_best: NonNegativeInt = 0
    background: bool = True


class LoraConfig(Strict):
    """Low-rank adapters on the language model instead of training its own weights (through `peft`)."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Probability = 0.0
    target_modules: list[str] = ["q_proj", "v_proj"]


LENGTHS = ("steps", "epochs", "tokens")  # the ways to say how long `train` goes on


class TrainConfig(Strict):
    """The optimisation; owner of batch, rate and precision.

    Attributes:
        trainable: `connector` (everything audio is trained, the language model is frozen), `all_but_ffn`, `all`.
        steps, epochs, tokens: give one. An epoch sees every selected question once; tokens are those of text, over all
            ranks, and the rate then follows the share of them that was seen.
        global_batch_size: questions per optimizer step over all ranks.
        micro_batch_size: sequences per rank and forward pass.
        micro_batch_tokens: positions per rank and forward pass, padding included: those of text and, as far as clips'
            lengths tell, of audio in the sequence. micro_batch_size is then the most sequences, and long ones come in
            fewer; how many passes a step takes varies.
        warmup_fraction: share of the steps in which the rate rises linearly, before the cosine.
        compile: let torch compile the language model's feed-forward layers, which takes a minute at the start and saves
            passes over memory; not under ZeRO-3.
        loss_on: `answer` tokens only, or also the `prompt` (all text).
        zero: a file of `ds_configs/` by its name, or a path to one; it holds ZeRO policy only.
        collective_timeout_s: a rank that waits longer for another one ends the job instead of hanging.
        peak_tflops: of one device at this precision, for the model FLOP/s utilisation; None: as its name tells, and no
            utilisation where that is not known.
        max_skipped_steps: this many steps in a row whose gradient is not finite end the job; single ones are skipped.
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
            raise InvalidConfig("train.steps", f"is one of {', '.join(LENGTHS)}, which exclude each other", "give one")
        if self.lora is not None and self.trainable != "connector":
            raise InvalidConfig(
                "train.lora",
                f"adapts a frozen language model but trainable is '{self.trainable}'",
                "use connector",
            )
        return self


def default_tracking_uri(output: Path) -> str:
    """An sqlite file beside the output folder."""
    return f"sqlite:///{output.absolute().parent / 'mlflow.db'}"


class TrackingConfig(Strict):
    """Where runs are recorded.

    Attributes:
        uri: an MLflow tracking URI without a password, for which MLflow reads MLFLOW_TRACKING_USERNAME and
            MLFLOW_TRACKING_PASSWORD (a database its own variables); None means `sqlite:///<output>/../mlflow.db`,
            beside the output folder.
        experiment: name of the MLflow experiment.
        run_name: None means the name of the output folder.
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
    """One stage of a curriculum: what it changes in `data` and in `train`, as parts of their trees."""

    data: dict[str, Any] = {}
    train: dict[str, Any] = {}


class ExperimentConfig(Strict):
    """One training run, or the stages of a curriculum.

    Attributes:
        output: receives checkpoints, metrics and the resolved config; of each stage in a folder of its own.
        starts_from: output folder of a finished run whose trained weights this one begins with, beside those that it
            began with itself.
        stages: run one after the other, each from the trained weights of those before it; see `curriculum`.
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
            raise InvalidConfig("train.steps", f"needs exactly one of {', '.join(LENGTHS)}", "give one")
        if self.train.checkpoint.keep_best and self.data.validation is None:
            raise InvalidConfig("train.checkpoint.keep_best", "has no effect without data.validation", "set both")
        return self

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step; with a bound on their positions, the fewest there can be.

        Raises:
            UserError: the global batch does not divide.
        """
        per_pass = self.train.micro_batch_size * self.data.questions_per_sequence * world_size
        steps, rest = divmod(self.train.global_batch_size, per_pass)
        if self.train.micro_batch_tokens is not None:
            unit = self.data.questions_per_sequence * world_size
            if self.train.global_batch_size % unit:
                raise UserError(
                    "train.global_batch_size",
                    f"{self.train.global_batch_size} questions do not divide into questions_per_sequence "
                    f"{self.data.questions_per_sequence} x {world_size} ranks = {unit}",
                    f"use a multiple of {unit}",
                )
            return steps + (rest > 0)
        if rest or not steps:
            raise UserError(
                "train.global_batch_size",
                f"{self.train.global_batch_size} questions do not divide into micro_batch_size "
                f"{self.train.micro_batch_size} x questions_per_sequence {self.data.questions_per_sequence} x "
                f"{world_size} ranks = {per_pass}",
                f"use a multiple of {per_pass}",
            )
        return steps
