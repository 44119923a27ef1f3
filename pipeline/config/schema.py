"""The config tree of one experiment. Each number has its one owner here; no file is read and no torch imported."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from pipeline.config.loading import InvalidConfig, Strict
from pipeline.errors import UserError
from pipeline.streams import (
    Connector,
    ConnectorKind,
    IntegrationKind,
    Preset,
    Stream,
    check_streams,
    preset_streams,
)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


def _parse_fraction(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        numerator, _, denominator = value.partition("/")
        if numerator.strip().isdigit() and denominator.strip().isdigit() and int(denominator):
            value = Fraction(int(numerator), int(denominator))
    elif isinstance(value, float):
        value = Fraction(value).limit_denominator(1000)  # 0.3333 means one third, as its writer meant it
    if isinstance(value, Fraction) and not 0 < value <= 1:
        raise ValueError("a fraction of the layers lies in (0, 1]")
    return value


LayerCount = Annotated[PositiveInt | Annotated[Fraction, PlainSerializer(str)] | None, BeforeValidator(_parse_fraction)]


# A path or a URL: as a Path, `s3://bucket` would lose a slash.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]


def _refuse_password(key: str, place: str | None) -> None:
    if place is not None and re.search(r"://[^/@\s]*:[^/@\s]*@", place):
        raise InvalidConfig(key, "holds a password, which would be logged", "give it by environment variables")


class ConnectorConfig(Strict):
    """See `pipeline.streams.Connector`."""

    kind: ConnectorKind = "mlp"
    width: PositiveInt | None = None
    summary_stride: PositiveInt = 1
    num_queries: PositiveInt = 32
    num_layers: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    hidden_size: PositiveInt | None = None

    def spec(self) -> Connector:
        return Connector(**self.model_dump())


class StreamConfig(Strict):
    """One stream of a custom integration; see `pipeline.streams.Stream`."""

    encoders: list[str] = Field(min_length=1)
    integration: IntegrationKind
    connector: ConnectorConfig = ConnectorConfig()
    audio_layers: list[NonNegativeInt] = []
    summary_of: NonNegativeInt | None = None


class LoraConfig(Strict):
    """Low-rank adapters on the language model instead of training its own weights (through `peft`)."""

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Probability = 0.0
    target_modules: list[str] = ["q_proj", "v_proj"]


class ModelConfig(Strict):
    """A language model plus streams.

    Attributes:
        language_model: a Hugging Face folder or Hub name.
        encoders: feature columns read, in the order the preset expects.
        integration: a preset, or `custom` with explicit `streams`.
        first_audio_layer, num_audio_layers, layer_stride: the rule for audio_layers; num_audio_layers may be a
            fraction of the layers ("1/3").
        audio_layers: an explicit list instead of the rule.
        summary_stride: frames merged into one summary token of `pal_v3`.
        norm_audio_tokens: apply the layer's own input norm to the projected audio tokens.
        system_text_sees_audio: lift the position rule for text before the audio.
        audio_queries: ablation; audio tokens also query the audio of their clip.
    """

    language_model: str
    encoders: list[str] = Field(default=["log_mel"], min_length=1)
    integration: Preset | Literal["custom"] = "lal"
    streams: list[StreamConfig] | None = None
    connector: ConnectorConfig = ConnectorConfig()
    first_audio_layer: NonNegativeInt | None = None
    num_audio_layers: LayerCount = None
    layer_stride: PositiveInt = 1
    audio_layers: list[NonNegativeInt] | None = None
    summary_stride: PositiveInt = 3
    norm_audio_tokens: bool = True
    system_text_sees_audio: bool = False
    audio_queries: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.integration == "custom") != (self.streams is not None):
            raise InvalidConfig("model.streams", "goes with integration: custom, and only with it", "set both")
        rule = (self.first_audio_layer, self.num_audio_layers, self.layer_stride)
        if self.audio_layers is not None and rule != (None, None, 1):
            raise InvalidConfig(
                "model.audio_layers",
                "is given beside first_audio_layer, num_audio_layers or layer_stride",
                "give the list or the rule",
            )
        return self

    def resolve_streams(self, num_layers: int) -> tuple[Stream, ...]:
        """The explicit streams for a language model of `num_layers` layers.

        Raises:
            UserError: a layer that the model does not have, encoders that do not suit the preset, or a setting that
                these streams make nothing of.
        """
        if self.integration == "custom":
            streams = tuple(
                Stream(tuple(s.encoders), s.integration, s.connector.spec(), tuple(s.audio_layers), s.summary_of)
                for s in self.streams or []
            )
        else:
            streams = preset_streams(
                self.integration,
                self.encoders,
                num_layers,
                connector=self.connector.spec(),
                summary_stride=self.summary_stride,
                first_audio_layer=self.first_audio_layer,
                num_audio_layers=self.num_audio_layers,
                layer_stride=self.layer_stride,
                audio_layers=None if self.audio_layers is None else tuple(self.audio_layers),
            )
        self._refuse_dead_settings(streams)
        return check_streams(streams, num_layers)

    def _refuse_dead_settings(self, streams: tuple[Stream, ...]) -> None:
        kinds = {stream.integration for stream in streams}
        rule = ("first_audio_layer", "num_audio_layers", "layer_stride", "audio_layers")
        needs = {name: self.integration != "custom" and kinds != {"plits"} for name in rule}
        needs |= dict.fromkeys(("audio_queries", "norm_audio_tokens"), "lal" in kinds)
        needs["summary_stride"] = self.integration == "pal_v3"
        for name, has_effect in needs.items():
            if not has_effect and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(
                    f"model.{name}", f"has no effect on integration '{self.integration}'", "remove this setting"
                )


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
