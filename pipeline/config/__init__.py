"""The typed config tree of an experiment, and its loader. Does not import torch."""

from pipeline.config.curriculum import choose_stages, resolve_stages
from pipeline.config.loading import dump_config, load_config, read_yaml, validate_config
from pipeline.config.model import ConnectorConfig, ModelConfig
from pipeline.config.schema import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LoraConfig,
    MixtureConfig,
    TrackingConfig,
    TrainConfig,
    default_tracking_uri,
)

__all__ = [
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "ExperimentConfig",
    "LoraConfig",
    "MixtureConfig",
    "ModelConfig",
    "TrackingConfig",
    "TrainConfig",
    "choose_stages",
    "default_tracking_uri",
    "dump_config",
    "load_config",
    "read_yaml",
    "resolve_stages",
    "validate_config",
]
