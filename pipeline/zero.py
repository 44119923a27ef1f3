"""The one door to DeepSpeed: renders its config, builds the engine, steps it, saves and loads its state.

`ds_configs/*.json` hold ZeRO policy only; batch, rate and precision come from the config tree, and `render` is the one
place where the two meet. Nothing here knows audio."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, free_port
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

POLICIES = Path(__file__).parent.parent / "ds_configs"
POLICY_KEYS = ("zero_optimization", "aio")
ADAM_EPSILON = 1e-8
STATE = "engine"  # folder of DeepSpeed's files inside a checkpoint


def render(policy: str, train: TrainConfig, *, world_size: int, accumulation: int, on_gpu: bool) -> dict[str, Any]:
    """The final DeepSpeed config. Every key that matters is written out, since DeepSpeed's defaults move.

    Args:
        policy: a file of `ds_configs/` by its name, or a path to one.
        train: owner of batch, rate and precision.
        accumulation: micro-batches per rank and optimizer step.
        on_gpu: use the fused optimizer; on CPU the plain one, which needs no compiler.

    Raises:
        UserError: no such policy, not JSON, a key that belongs to `train`, or a left-over "auto".
    """
    policy_values = _read_policy(policy)
    zero = policy_values["zero_optimization"]
    stage, offloads = zero["stage"], "offload_optimizer" in zero
    # Gradients add up in fp32 over micro-batches, so that accumulation does not change the result; DeepSpeed's
    # stage 0 can only add up in the model's own precision.
    accumulation_dtype = train.precision if stage == 0 else "fp32"
    rendered = {
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
                "lr": train.learning_rate,
                "betas": [train.adam_beta1, train.adam_beta2],
                "eps": ADAM_EPSILON,
                "weight_decay": train.weight_decay,
                # torch's AdamW needs no compiler; only offloading wants DeepSpeed's own, built for host memory.
                **({"torch_adam": False} if offloads else {"torch_adam": True, "fused": on_gpu}),
            },
        },
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": True,
        # Recomputation is the model's own, in the non-reentrant form: DeepSpeed's is reentrant, which drops the
        # gradients of tensors passed by keyword.
        "activation_checkpointing": {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        },
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
        "steps_per_print": 10**9,  # the trainer owns the console
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_allgather": False,
        "log_level": "warning",
        **policy_values,
    }
    _refuse_auto(rendered, "", policy)
    return rendered


def _read_policy(policy: str) -> dict[str, Any]:
    path = Path(policy)
    if not path.is_file():
        path = POLICIES / f"{policy}.json"
    if not path.is_file():
        known = sorted(p.stem for p in POLICIES.glob("*.json"))
        raise UserError("train.zero", f"no ZeRO policy '{policy}'", nearest(policy, known))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(path, f"is not JSON ({error})", "correct the file") from error
    stage = values.get("zero_optimization", {}).get("stage") if isinstance(values, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(path, "has no zero_optimization.stage from 0 to 3", "see ds_configs/zero2.json")
    for key in values:
        if key not in POLICY_KEYS:
            raise UserError(path, f"'{key}' is not ZeRO policy", "set batch, rate and precision in train.*")
    return values


def _refuse_auto(values: Mapping[str, Any], prefix: str, policy: str) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{prefix}{key}.", policy)
        elif value == "auto":
            raise UserError(policy, f'{prefix}{key} is "auto", which DeepSpeed does not resolve', "write a value")


def zero_stage(rendered: Mapping[str, Any]) -> int:
    """The ZeRO stage of a rendered config."""
    return int(rendered["zero_optimization"]["stage"])


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or did not answer in time."""
    import torch

    # gloo raises a plain RuntimeError, whose text names its source file or its timeout.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "Timed out waiting" in str(error)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float
    weight_decay: float


def rate_factor(step: int, total_steps: int, warmup_fraction: float, final_fraction: float) -> float:
    """Share of the peak rate at optimizer step 1..total_steps: linear warm-up, then a cosine to `final_fraction`.

    A function of the step alone, so that a resumed run and a skipped step cannot shift the schedule.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def init_process_group(ranks: Ranks, timeout_s: float) -> None:
    """Joins the process group: gloo on CPU, NCCL on GPUs.

    A collective that waits longer than `timeout_s` for another rank raises instead of hanging.
    """
    import deepspeed
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed would compile an all-reduce that only its inference uses (20 s, and 69 MB of /dev/shm a rank).
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "MASTER_ADDR" not in os.environ:  # started without a launcher: a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    get_accelerator().set_device(ranks.local_rank)
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)


def on_gpu() -> bool:
    """Whether DeepSpeed runs on a GPU here."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"


class Engine:
    """A model under DeepSpeed. Callers see losses, steps and checkpoints, never DeepSpeed itself.

    Args:
        model: returns an object with a scalar `.loss`; parameters that are not in `groups` must be frozen.
        groups: what is optimized.
        rendered: from `render`.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[ParameterGroup], rendered: dict[str, Any]) -> None:
        import deepspeed
        import torch

        self._torch = torch
        self.groups = [group for group in groups if group.parameters]
        self.accumulation: int = rendered["gradient_accumulation_steps"]
        self.stage = zero_stage(rendered)
        # In fp32 without ZeRO DeepSpeed neither reports the gradient norm nor refuses one that is not finite, so that
        # norm, check and clipping are done here.
        self._plain = self.stage == 0 and not rendered["bf16"]["enabled"] and not rendered["fp16"]["enabled"]
        self._clipping: float = rendered["gradient_clipping"]
        if self._plain:
            rendered = {**rendered, "gradient_clipping": 0.0}
        optimizer_groups = [
            {"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay, "name": g.name}
            for g in self.groups
        ]
        self._engine, *_ = deepspeed.initialize(model=model, model_parameters=optimizer_groups, config=rendered)
        self.world_size: int = torch.distributed.get_world_size()
        self.device: torch.device = self._engine.device
        # Counts travel between hosts on CPU tensors: agreeing on them never waits for the accelerator.
        self._control: Any = torch.distributed.new_group(backend="gloo") if self.device.type != "cpu" else None
        self.gradient_norm = math.nan
        self.skipped_steps = 0

    @property
    def loss_share(self) -> float:
        """What one micro-batch's loss counts in the gradient.

        DeepSpeed divides each micro-batch's loss by A (`accumulation`) and averages gradients over W ranks, so

            gradient = d/dw sum_{rank, micro} loss / (A W).

        With loss = L / (T / (A W)), where L is a micro-batch's summed cross-entropy and T the answer tokens of the
        whole global batch, this is d/dw (sum L) / T: every answer token counts the same wherever it lies. So models
        are called with num_items_in_batch = T * loss_share.
        """
        return 1.0 / (self.accumulation * self.world_size)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Adds up host numbers over all ranks, without waiting for the accelerator."""
        totals = self._torch.tensor(values, dtype=self._torch.float64)
        self._torch.distributed.all_reduce(totals, group=self._control)
        return totals.tolist()

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """One small object from every rank, in the order of ranks."""
        gathered: list[Any] = [None] * self.world_size
        self._torch.distributed.all_gather_object(gathered, value, group=self._control)
        return gathered

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.sum_over_ranks([0.0])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and no dropout in here."""
        self._engine.eval()
        with self._torch.no_grad():
            yield
        self._engine.train()

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The scalar loss of one micro-batch that lies on `device`."""
        return self._engine(**batch).loss

    def backward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its detached loss, still on the device."""
        loss = self.forward(batch)
        self._engine.backward(loss)
        return loss.detach()

    def micro_step(self) -> None:
        """Tells DeepSpeed that a micro-batch, not the last of its optimizer step, is done."""
        self._engine.step()

    def step(self, factor: float) -> bool:
        """The optimizer step after the last micro-batch, at `factor` times each group's peak rate.

        Returns:
            False when a gradient was not finite: DeepSpeed then leaves weights and optimizer untouched.
        """
        for values, group in zip(self._engine.optimizer.param_groups, self.groups, strict=True):
            # Not the rate alone: loading a universal checkpoint under ZeRO-3 gives every group the first one's values.
            values.update(lr=group.learning_rate * factor, weight_decay=group.weight_decay)
        applied = self._clip_and_check() if self._plain else True
        self._engine.step()
        if not self._plain:
            self.gradient_norm = self._engine.get_global_grad_norm()
            applied = self._engine.was_step_applied()
        self.skipped_steps += not applied
        return applied

    def _clip_and_check(self) -> bool:
        parameters = [p for group in self.groups for p in group.parameters]
        norm = self._torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.gradient_norm = norm.item()
        if not math.isfinite(self.gradient_norm):
            self._engine.zero_grad()  # to None, which the optimizer passes over
            return False
        if self._clipping:
            self._torch.nn.utils.clip_grads_with_norm_(parameters, self._clipping, norm)
        return True

    def save(self, folder: Path) -> None:
        """Writes every rank's state under `folder`; frozen parameters are left out. Called by all ranks."""
        frozen = {p.data_ptr() for p in self._engine.module.parameters() if not p.requires_grad} - {0}

        def drop_frozen(_module: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
            # DeepSpeed goes by name and would keep the second name of a tied weight: a frozen output embedding.
            for name in [name for name, tensor in state.items() if tensor.data_ptr() in frozen]:
                del state[name]

        hook = self._engine.module.register_state_dict_post_hook(drop_frozen)
        try:
            self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
        finally:
            hook.remove()

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, at the same world size. Called by all ranks.

        Raises:
            RuntimeError: DeepSpeed found no state there.
        """
        # Frozen parameters are not in the file, hence not strict; the trainable ones are checked here instead.
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no state in {folder}")
        if self.stage == 3:  # a universal checkpoint gives all groups one step counter, which each would then advance
            for state in self._engine.optimizer.optimizer.state.values():
                state["step"] = self._torch.as_tensor(state["step"]).clone()

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """The whole model on rank 0 (CPU, the model's precision), None elsewhere. Called by all ranks."""
        if self.stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict()
        else:
            state = self._engine.module.state_dict()
        if self._torch.distributed.get_rank() != 0:
            return None
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def close(self) -> None:
        """Leaves the process group."""
        self._engine.destroy()
        self._torch.distributed.destroy_process_group()


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained parameters by name from what `Engine.save` wrote, in fp32, without an engine or a process group."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list((folder / STATE).glob("*optim_states.pt")):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=True)
    # Without ZeRO there are no partitions to put together. The file is our own: its hash was verified before.
    (file,) = (folder / STATE).glob("mp_rank_*_model_states.pt")
    return {k: v.float() for k, v in torch.load(file, map_location="cpu", weights_only=False)["module"].items()}
