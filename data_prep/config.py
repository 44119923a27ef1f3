"""The config tree of one preparation: manifest -> audio -> encoders -> shards. No torch, no file is read here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import PositiveInt
from pipeline.config.loading import InvalidConfig, Strict
from pipeline.core.feature_contract import CLIPS

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
    """Log-mel frames, stacked: no weights, the encoder that needs no download.

    Attributes:
        num_mels: mel bins; a stored frame is num_mels x frames_per_token wide.
        frames_per_token: neighbouring frames stacked into one stored frame.
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
            raise InvalidConfig("window_ms", "is shorter than hop_ms", "let windows cover all samples")
        return self


class _WeightsConfig(Strict):
    """What encoders with weights have in common.

    Attributes:
        model: a folder, a file where the kind allows one, or a Hugging Face Hub name.
        revision: of a Hub name; pin it for a corpus that is to grow.
        dtype: of the forward pass; features are stored in float16 in any case.
        compile: run the model through torch.compile.
        pool: time steps averaged into one stored frame.
    """

    model: str
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    pool: PositiveInt = 1


class WhisperConfig(_WeightsConfig):
    """Whisper's encoder. layer: which layer's output to store, from 1; None means the last one, normalised."""

    kind: Literal["whisper"]
    layer: PositiveInt | None = None


class AfWhisperConfig(_WeightsConfig):
    """AF-Whisper, the encoder of Audio Flamingo 3, alone or inside the whole model's folder."""

    kind: Literal["af_whisper"]


class ClapConfig(_WeightsConfig):
    """LAION CLAP's audio tower (HTSAT)."""

    kind: Literal["clap"]


class SslamConfig(_WeightsConfig):
    """SSLAM (or EAT) base, from the official checkpoint file or the Hugging Face folder.

    layer: which block's output to store, from 1; None means the last one.
    """

    kind: Literal["sslam"]
    num_heads: PositiveInt = 12
    layer: PositiveInt | None = None


EncoderConfig = Annotated[
    LogMelConfig | WhisperConfig | AfWhisperConfig | ClapConfig | SslamConfig, Field(discriminator="kind")
]


class TableConfig(Strict):
    """What the rows of a table (CSV, folder, Parquet, WebDataset) mean: templates such as `{caption}` over its fields.

    Attributes:
        clip_id: None means the format's own name of the clip (path, key), and rows of the same clip are joined.
        question: of every row; tables hold answers only. None is an error for them; of the formats in JSON, SLAM-LLM
            uses it where a row has no prompt.
        answers: each becomes a question of its own.
        task, dataset, domain: also used by the formats in JSON that do not tell them (without templates there).
    """

    clip_id: str | None = None
    audio: str = "{audio}"
    question: str | None = None
    answers: list[str] = Field(default=["{answer}"], min_length=1)
    task: str = "unspecified"
    dataset: str = "unspecified"
    domain: str = "unspecified"


class WorkersConfig(Strict):
    """What the Ray actors get; each loads its encoders once, decodes with its CPUs and writes its own shards.

    Attributes:
        min: actors that must have started for the run to go on.
        max: bound on actors; None takes what the cluster's CPUs (and GPUs) hold.
        cpus, gpus: resources of one actor; gpus may be a fraction, so that actors share a GPU.
        start_timeout_s: how long to wait for `min` actors.
        stall_timeout_s: an actor that gives no sign for so long counts as dead (a clip may hang its decoder).
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
    """One feature set.

    Attributes:
        manifest: one manifest, or several that are read one after the other; `*` matches, `s3://` and the like work.
        format: `auto` tells it from the name and the first record.
        table: how to read formats that hold no questions.
        audio_root: folder that relative audio paths start from, and that none may leave; None means the folder of
            each manifest, and then absolute paths are taken as they are.
        output: folder of the feature set.
        encoders: feature column -> encoder; `{}` for questions about no clip, whose rows name no audio (JSON lines).
        partition_clips: clips of one unit of work; a crash costs at most one partition of each worker.
        batch_s: seconds of (padded) audio per encoder pass.
        max_clip_s: longer clips are rejected; None takes any length.
        max_attempts: how often a clip may kill its worker before it is rejected.
        max_reject_fraction: the run fails when more of the clips are rejected.
        mixed_devices: let one encoder's features come from several kinds of devices, whose numbers differ enough to
            cost accuracy; the contract then names them all.
    """

    manifest: str | Annotated[list[str], Field(min_length=1)]
    format: ManifestFormat = "auto"
    table: TableConfig = TableConfig()
    audio_root: str | None = None
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
                raise InvalidConfig(f"encoders.{name}", "is a folder of the feature set itself", "rename this column")
        return self

    @property
    def manifests(self) -> list[str]:
        return [self.manifest] if isinstance(self.manifest, str) else list(self.manifest)
