"""The MLflow run of a training run: its parameters, tags and artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable

from pipeline.config import ExperimentConfig, dump_config
from pipeline.config.flat import flatten
from pipeline.core import provenance
from pipeline.model import count_parameters
from pipeline.tracking.writer import RunDescription, Tracker
from pipeline.training import run_dir
from pipeline.training.build import Components
from pipeline.training.run_dir import RunRecord


def start_tracker(
    config: ExperimentConfig,
    components: Components,
    run: RunRecord,
    on_run_id: Callable[[str], None],
    *,
    world_size: int,
) -> Tracker:
    """Starts the tracker of a run; makes the run the owner of its output folder, and writes its resolved config there.

    Called on rank 0 only.

    Args:
        on_run_id: called from the tracker's thread as soon as the MLflow run has an id.
    """
    run_dir.write_run(config.output, run)
    resolved = dump_config(config)
    (config.output / run_dir.CONFIG).write_text(resolved, encoding="utf-8")
    streams = components.model.config.stream_specs()
    description = RunDescription(
        params={
            **flatten(config.model_dump(mode="json")),
            "resolved.steps": components.total_steps,
            **{f"resolved.{kind}_parameters": n for kind, n in count_parameters(components.model).items()},
            "resolved.audio_layers": [list(stream.audio_layers) for stream in streams],
            "resolved.world_size": world_size,
            **{f"resolved.{k}": v for k, v in provenance.language_model_identity(config.model.language_model).items()},
        },
        tags={
            "pal.kind": "train",
            "pal.integration": config.model.integration,
            **config.tracking.tags,
            "pal.features": components.features.contract.fingerprint,
            **provenance.git_state(),
            **{f"version.{name}": version for name, version in provenance.package_versions().items()},
        },
        artifacts={run_dir.CONFIG: resolved, "deepspeed.json": json.dumps(components.ds_config, indent=2)},
    )
    return Tracker(config.tracking, config.output, run_id=run.run_id, description=description, on_run_id=on_run_id)
