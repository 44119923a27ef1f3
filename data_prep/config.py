"""Defines the config of one preparation: manifest -> audio -> encoders -> shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import PositiveInt
from pipeline.config.loading import InvalidConfig
from pipeline.core.feature_contract import CLIPS
from pipeline.core.records import Strict

PositiveFloat = Annotated[float, Field(gt=0)]
ColumnName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ManifestFormat = Literal[
    "auto",
    "jsonl",
    "openaqa",
    "slam_llm",
    "messages",
    "audio_flamingo",
    "csv",
    "folder",
    "parquet",
    "webdataset",
]

RESERVED_FOLDERS = {CLIPS, "plan", "commits"}


class LogMelConfig(Strict):
    """Stacked log-mel frames: the encoder without weights, which needs no download.

    Attributes:
        sample_rate_hz: rate that clips are resampled to.
        num_mels: number of mel bins; a stored frame is num_mels x frames_per_token wide.
        frames_per_token: number of consecutive frames stacked into one stored frame.
        hop_ms, window_ms: hop and window length of the spectrogram.
        mean, std: fixed normalisation of log(mel power + 1e-6), the same for every clip.
    """

    kind: Literal["log_mel"] = "log_mel"
    sample_rate_hz: PositiveInt = 16000
    num_mels: PositiveInt = 64
    frames_per_token: PositiveInt = 4
    hop_ms: PositiveFloat = 10.0
    window_ms: PositiveFloat = 25.0
    mean: float = -7.5
    std: PositiveFloat = 3.5

    @model_validator(mode="after")
    def _consistent(self) -> LogMelConfig:
        for key in ("hop_ms", "window_ms"):
            samples = getattr(self, key) * self.sample_rate_hz / 1000
            if samples != int(samples):
                raise InvalidConfig(key, f"is {samples} samples at {self.sample_rate_hz} Hz", "use whole samples")
        if self.window_ms < self.hop_ms:
            raise InvalidConfig("window_ms", "is shorter than hop_ms", "make the window at least one hop long")
        return self


class _WeightsConfig(Strict):
    """The settings that all encoders with weights share.

    Attributes:
        model: folder, file (where the kind allows one) or Hugging Face Hub name of the weights.
        revision: revision of a Hub name; pin it for a corpus that will grow.
        dtype: dtype of the forward pass; features are always stored in float16.
        compile: whether to compile the model with torch.compile.
        pool: number of time steps averaged into one stored frame.
    """

    model: str
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    pool: PositiveInt = 1


class _WindowConfig(_WeightsConfig):
    """The settings of encoders that pad every clip to windows.

    Attributes:
        window_s: length of a window in seconds; None means the one that the model was trained with (30 s for Whisper).
            A shorter one costs less for short clips. AF-Whisper masks the padding, so that only clips longer than the
            window change; Whisper attends to the padding, and was never trained with less of it: its features of a
            shorter window differ, and how well they work is to be measured.
    """

    window_s: PositiveFloat | None = None


class WhisperConfig(_WindowConfig):
    """Whisper's encoder.

    Attributes:
        layer: number of the layer whose output is stored, from 1; None means the last one, normalised.
    """

    kind: Literal["whisper"]
    layer: PositiveInt | None = None


class AfWhisperConfig(_WindowConfig):
    """AF-Whisper, the encoder of Audio Flamingo 3, from its own folder or from that of the whole model."""

    kind: Literal["af_whisper"]


class ClapConfig(_WeightsConfig):
    """LAION CLAP's audio tower (HTSAT)."""

    kind: Literal["clap"]


class SslamConfig(_WeightsConfig):
    """SSLAM (or EAT) base, from the official checkpoint file or the Hugging Face folder.

    Attributes:
        num_heads: number of attention heads, which the checkpoint does not record.
        layer: number of the block whose output is stored, from 1; None means the last one.
    """

    kind: Literal["sslam"]
    num_heads: PositiveInt = 12
    layer: PositiveInt | None = None


EncoderConfig = Annotated[
    LogMelConfig | WhisperConfig | AfWhisperConfig | ClapConfig | SslamConfig, Field(discriminator="kind")
]


class TableConfig(Strict):
    """Templates such as `{caption}` that map the fields of a table (CSV, folder, Parquet, WebDataset) to clips.

    Attributes:
        clip_id: id of the clip; None means the format's own name of it (path, key); rows with the same audio are
            joined.
        audio: path of the audio.
        start, end: seconds from the beginning of the file at which the clip starts and ends; None means its beginning
            and its end. A table with columns of these times needs them: `null` for files that are cut already.
        duration: seconds after the start, in place of `end`.
        question: question of all rows, since tables hold answers only; required for tables. Among the JSON formats,
            SLAM-LLM uses it for rows without a prompt.
        answers: answers of a row; each becomes a question of its own.
        task, dataset, domain: also used, without templates, by JSON formats that lack these fields.
    """

    clip_id: str | None = None
    audio: str = "{audio}"
    start: str | None = None
    end: str | None = None
    duration: str | None = None
    question: str | None = None
    answers: list[str] = Field(default=["{answer}"], min_length=1)
    task: str = "unspecified"
    dataset: str = "unspecified"
    domain: str = "unspecified"

    @model_validator(mode="after")
    def _consistent(self) -> TableConfig:
        if self.end is not None and self.duration is not None:
            raise InvalidConfig("table.duration", "is given beside table.end", "remove one of the two")
        return self


class WorkersConfig(Strict):
    """Number and resources of the Ray actors; each loads the encoders once, decodes on its CPUs and writes its shards.

    Attributes:
        min: number of actors that must start within `start_timeout_s`.
        max: maximum number of actors; None means as many as fit on the cluster's CPUs (and GPUs).
        cpus, gpus: resources of one actor; gpus may be a fraction, so that actors share a GPU.
        start_timeout_s: how long to wait for `min` actors.
        stall_timeout_s: how long an actor may report nothing before it is killed (a clip may hang its decoder).
    """

    min: PositiveInt = 1
    max: PositiveInt | None = None
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    start_timeout_s: PositiveFloat = 600.0
    stall_timeout_s: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _consistent(self) -> WorkersConfig:
        if self.max is not None and self.max < self.min:
            raise InvalidConfig("workers.max", f"{self.max} is below workers.min {self.min}", "raise it")
        return self


class PrepareConfig(Strict):
    """The preparation of one feature set.

    Attributes:
        manifest: one manifest, or several that are read in order; patterns with `*` and URLs such as `s3://` work.
        format: format of the manifests; `auto` detects it from the name and the first record.
        table: how to read formats that hold no questions.
        audio_root: folder that relative audio paths start from and that no path may leave; None means the folder of
            each manifest, and then absolute paths are allowed.
        audio_paths: start of the manifest's audio paths -> folder that replaces it, absolute or relative to
            `audio_root`: `{/data/sls/audioset: my/folder}` for paths of another machine. The longest match counts.
        output: folder of the feature set.
        encoders: encoder of each feature column, by name; `{}` for questions without audio (JSON lines).
        workers: number and resources of the Ray actors.
        partition_clips: number of clips per partition; a crash costs at most one partition of each worker.
        batch_s: seconds of audio per forward pass of an encoder, padding included.
        max_clip_s: longest clip that is accepted, in seconds; None means no limit.
        max_attempts: number of times that a clip may kill its worker before it is rejected.
        max_reject_fraction: largest fraction of rejected clips with which the run succeeds.
        mixed_devices: whether the features of one encoder may come from several kinds of devices, whose numerical
            differences can cost accuracy; the contract then names them all.
    """

    manifest: str | Annotated[list[str], Field(min_length=1)]
    format: ManifestFormat = "auto"
    table: TableConfig = TableConfig()
    audio_root: str | None = None
    audio_paths: dict[str, str] = {}
    output: str
    encoders: dict[ColumnName, EncoderConfig] = {"log_mel": LogMelConfig()}
    workers: WorkersConfig = WorkersConfig()
    partition_clips: PositiveInt = 2000
    batch_s: PositiveFloat = 120.0
    max_clip_s: PositiveFloat | None = None
    max_attempts: PositiveInt = 3
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    mixed_devices: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> PrepareConfig:
        for name in self.encoders:
            if name in RESERVED_FOLDERS:
                raise InvalidConfig(
                    f"encoders.{name}", "is the name of a folder of every feature set", "rename this column"
                )
        return self

    @property
    def manifests(self) -> list[str]:
        """`manifest` as a list."""
        return [self.manifest] if isinstance(self.manifest, str) else list(self.manifest)
