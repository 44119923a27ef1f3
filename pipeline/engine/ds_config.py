"""Builds DeepSpeed's config: `ds_configs/*.json` hold the ZeRO policy only; batch, rate and precision come from the
experiment's config, and `build_ds_config` joins the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.core.errors import UserError, nearest

POLICIES = Path(__file__).parents[2] / "ds_configs"  # beside `pipeline` in a checkout as in site-packages
POLICY_KEYS = ("zero_optimization", "aio")
ADAM_EPSILON = 1e-8


def build_ds_config(
    policy: str, train: TrainConfig, *, world_size: int, accumulation: int, on_gpu: bool
) -> dict[str, Any]:
    """Returns the final DeepSpeed config, with every key that matters, because DeepSpeed's defaults change.

    Args:
        policy: name of a file in `ds_configs/`, or a path to a policy file.
        train: config section that sets batch, rate and precision.
        world_size: number of ranks.
        accumulation: micro-batches per rank and optimizer step.
        on_gpu: use the fused optimizer; on CPU the plain one, which needs no compiler.

    Raises:
        UserError: the policy does not exist, is not JSON, holds a key that `train` sets, holds "auto", or does not
            work with a setting of `train`.
    """
    policy_values = _read_policy(policy)
    zero = policy_values["zero_optimization"]
    stage, offloads = zero["stage"], "offload_optimizer" in zero
    if train.compile and stage == 3:
        fault = "does not work with ZeRO-3, which gathers parameters inside the functions that would be compiled"
        raise UserError("train.compile", fault, "leave it out, or choose another train.zero")
    # Gradients of micro-batches accumulate in fp32, so that accumulation does not change the result; DeepSpeed's
    # stage 0 can accumulate only in the model's precision.
    accumulation_dtype = train.precision if stage == 0 else "fp32"
    ds_config = {
        "train_batch_size": train.micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        "gradient_clipping": train.gradient_clipping,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": train.precision,
        "data_types": {"grad_accum_dtype": accumulation_dtype},
        "bf16": {
            "enabled": train.precision == "bf16",
            "check_grad_overflow": True,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": train.precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,  # a default: each parameter group passes its own rate to the optimizer
                "betas": [train.adam_beta1, train.adam_beta2],
                "eps": ADAM_EPSILON,
                "weight_decay": train.weight_decay,
                # torch's AdamW needs no compiler; only offloading needs DeepSpeed's AdamW for host memory.
                **({"torch_adam": False} if offloads else {"torch_adam": True, "fused": on_gpu}),
            },
        },
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": True,
        # The model does its own, non-reentrant checkpointing: DeepSpeed's is reentrant, which drops the gradients of
        # tensors passed by keyword.
        "activation_checkpointing": {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
        "steps_per_print": 10**9,  # the trainer logs the steps
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_allgather": False,
        "log_level": "warning",
        **policy_values,
    }
    _refuse_auto(ds_config, "", policy)
    return ds_config


def policy_names() -> list[str]:
    """Returns the names of the policies in `ds_configs/`, sorted.

    Raises:
        UserError: there are none, because the installation is incomplete.
    """
    names = sorted(path.stem for path in POLICIES.glob("*.json"))
    if not names:
        fault = "holds no ZeRO policy (*.json), though the policies are part of pal-pipeline"
        raise UserError(POLICIES, fault, "reinstall pal-pipeline, or set train.zero to the path of a policy file")
    return names


def _read_policy(policy: str) -> dict[str, Any]:
    path = Path(policy)
    if not path.is_file():
        path = POLICIES / f"{policy}.json"
    if not path.is_file():
        raise UserError("train.zero", f"no ZeRO policy '{policy}'", nearest(policy, policy_names()))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(path, f"is not JSON ({error})", "correct the file") from error
    stage = values.get("zero_optimization", {}).get("stage") if isinstance(values, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(path, "has no zero_optimization.stage from 0 to 3", "see ds_configs/README.md")
    for key in values:
        if key not in POLICY_KEYS:
            raise UserError(path, f"'{key}' is not part of a ZeRO policy", "set batch, rate and precision in train.*")
    return values


def _refuse_auto(values: Mapping[str, Any], prefix: str, policy: str) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{prefix}{key}.", policy)
        elif value == "auto":
            raise UserError(policy, f'{prefix}{key} is "auto", which DeepSpeed does not resolve', "write a value")


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage of a DeepSpeed config."""
    return int(ds_config["zero_optimization"]["stage"])
