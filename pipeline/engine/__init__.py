"""DeepSpeed: the only package that imports it (import-linter checks this). Callers see losses, optimizer steps,
checkpoints and plain dictionaries; nothing in this package depends on audio."""

from pipeline.engine.checkpoint_io import Snapshot, start_resharding, trained_weights
from pipeline.engine.ds_config import ADAM_EPSILON, POLICIES, build_ds_config, policy_names, zero_stage
from pipeline.engine.engine import Engine
from pipeline.engine.parameter_groups import ParameterGroup, parameter_groups
from pipeline.engine.patches import set_group_timeouts
from pipeline.engine.process_group import (
    from_main_rank,
    gathered,
    init_process_group,
    is_lost_peer,
    leave_process_group,
    on_gpu,
    partitioned_loading,
    require_same_everywhere,
)

__all__ = [
    "ADAM_EPSILON",
    "POLICIES",
    "Engine",
    "ParameterGroup",
    "Snapshot",
    "build_ds_config",
    "from_main_rank",
    "gathered",
    "init_process_group",
    "is_lost_peer",
    "leave_process_group",
    "on_gpu",
    "parameter_groups",
    "partitioned_loading",
    "policy_names",
    "require_same_everywhere",
    "set_group_timeouts",
    "start_resharding",
    "trained_weights",
    "zero_stage",
]
