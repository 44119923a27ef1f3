"""The typed config tree of an experiment and its loader. Imports no torch."""

from pipeline.config.loading import Strict, dump_config, load_config, read_yaml, validate_config
from pipeline.config.schema import (
    CheckpointConfig,
    ConnectorConfig,
    DataConfig,
    ExperimentConfig,
    MixtureConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "ExperimentConfig",
    "MixtureConfig",
    "ModelConfig",
    "Strict",
    "TrackingConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "read_yaml",
    "validate_config",
]
