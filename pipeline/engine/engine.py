"""A model under DeepSpeed: computes gradients, takes optimizer steps, saves and loads state."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.checkpoint_io import STATE, Snapshot, checksum, collecting
from pipeline.engine.ds_config import zero_stage
from pipeline.engine.parameter_groups import ParameterGroup
from pipeline.engine.patches import local_partition, restore_swapped_optimizer, set_universal
from pipeline.engine.process_group import gathered

if TYPE_CHECKING:
    import torch


class Engine:
    """A model under DeepSpeed. Its methods hide DeepSpeed behind losses, steps and checkpoints.

    Args:
        model: returns an object with a scalar `.loss`; parameters that are not in `groups` must be frozen.
        groups: parameters to optimize.
        ds_config: DeepSpeed config from `build_ds_config`.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[ParameterGroup], ds_config: dict[str, Any]) -> None:
        import deepspeed
        import torch

        self._torch = torch
        self.groups = [group for group in groups if group.parameters]
        self.accumulation: int = ds_config["gradient_accumulation_steps"]
        self.stage = zero_stage(ds_config)
        # In fp32 without ZeRO, DeepSpeed neither reports the gradient norm nor skips a step whose gradient is not
        # finite; `_clip_and_check` does both, and clips.
        self._plain = self.stage == 0 and not ds_config["bf16"]["enabled"] and not ds_config["fp16"]["enabled"]
        self._clipping: float = ds_config["gradient_clipping"]
        if self._plain:
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        optimizer_groups = [
            {"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay, "name": g.name}
            for g in self.groups
        ]
        self._engine, *_ = deepspeed.initialize(model=model, model_parameters=optimizer_groups, config=ds_config)
        self.world_size: int = torch.distributed.get_world_size()
        self.device: torch.device = self._engine.device
        # Host numbers are exchanged as CPU tensors, so that the exchange never waits for the accelerator.
        self._control: Any = torch.distributed.new_group(backend="gloo") if self.device.type != "cpu" else None
        self._swaps_states = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme"
        self._frozen_checksum = ""
        self.gradient_norm = math.nan
        self.skipped_steps = 0

    @property
    def loss_share(self) -> float:
        """Weight of one micro-batch's loss in the gradient.

        DeepSpeed divides each micro-batch's loss by A (`accumulation`, a constant whatever the number of micro-batches)
        and averages gradients over W ranks, so

            gradient = d/dw sum_{rank, micro} loss / (A W).

        With loss = L / (T / (A W)), where L is a micro-batch's summed cross-entropy and T the number of answer tokens
        in the global batch, this is d/dw (sum L) / T: every answer token has the same weight wherever it lies. So
        models are called with num_items_in_batch = T * loss_share.
        """
        return 1.0 / (self.accumulation * self.world_size)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Adds up host numbers over all ranks, without waiting for the accelerator."""
        totals = self._torch.tensor(values, dtype=self._torch.float64)
        self._torch.distributed.all_reduce(totals, group=self._control)
        return totals.tolist()

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Returns one small object from every rank, in the order of ranks."""
        by_rank: list[Any] = [None] * self.world_size
        self._torch.distributed.all_gather_object(by_rank, value, group=self._control)
        return by_rank

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.sum_over_ranks([0.0])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turns gradients and dropout off within the block."""
        self._engine.eval()
        try:
            with self._torch.no_grad():
                yield
        finally:
            self._engine.train()

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Returns the scalar loss of one micro-batch."""
        return self._engine(**batch).loss

    def backward(
        self, batch: Mapping[str, Any], *, last: bool, on_output: Callable[[Any], None] | None = None
    ) -> torch.Tensor:
        """Runs forward and backward of one micro-batch; returns its detached loss, still on the device.

        Args:
            last: whether this is the last micro-batch of the optimizer step; their number may vary between steps.
            on_output: receives the model's output.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        output = self._engine(**batch)
        self._engine.backward(output.loss)
        if not last:
            self._engine.step()
        if on_output is not None:
            on_output(output)
        return output.loss.detach()

    def groups_without_gradient(self) -> list[str]:
        """Returns groups in which every gradient is zero. All ranks call it between the last backward and `step`."""
        from deepspeed.utils import safe_get_full_grad

        def has_gradient(parameter: torch.nn.Parameter) -> bool:
            gradient = safe_get_full_grad(parameter)
            return gradient is not None and bool(gradient.any())

        return [group.name for group in self.groups if not any(map(has_gradient, group.parameters))]

    def step(self, lr_multiplier: float) -> bool:
        """Takes the optimizer step after the last micro-batch, at `lr_multiplier` times each group's peak rate.

        Returns:
            False if a gradient was not finite: DeepSpeed then leaves weights and optimizer untouched.
        """
        for values, group in zip(self._engine.optimizer.param_groups, self.groups, strict=True):
            # Sets the weight decay too: a universal checkpoint under ZeRO-3 gives every group the first group's values.
            values.update(lr=group.learning_rate * lr_multiplier, weight_decay=group.weight_decay)
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
            self._engine.zero_grad()  # sets gradients to None, and the optimizer skips such parameters
            return False
        if self._clipping:
            self._torch.nn.utils.clip_grads_with_norm_(parameters, self._clipping, norm)
        return True

    def snapshot(self, folder: Path, *, copied: bool) -> Snapshot:
        """Returns this rank's part of a checkpoint in `folder`, without frozen parameters. All ranks call it.

        Writes nothing yet, apart from copies of files that are swapped to NVMe: a full disk must not stop one rank
        between DeepSpeed's barriers.

        Args:
            copied: copy to host memory, so that training can continue before the snapshot is written.
        """
        frozen = {p.data_ptr() for p in self._engine.module.parameters() if not p.requires_grad} - {0}

        def drop_frozen(_module: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
            # DeepSpeed excludes by name and would keep a tied weight's second name: a frozen output embedding.
            for name in [name for name, tensor in state.items() if tensor.data_ptr() in frozen]:
                del state[name]

        hook = self._engine.module.register_state_dict_post_hook(drop_frozen)
        try:
            with collecting(self._engine, copied=copied) as snapshot:
                self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
        finally:
            hook.remove()
        return snapshot

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """Restores what a snapshot wrote. All ranks call it.

        Args:
            universal: whether `start_resharding` wrote the folder; otherwise the same number of ranks wrote it.

        Raises:
            RuntimeError: DeepSpeed found no state there.
        """
        set_universal(self._engine, universal)
        # Not strict, because frozen parameters are not in the files; `checksums` compares the trained ones.
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no state in {folder}")
        if self._swaps_states:
            restore_swapped_optimizer(self._engine, folder, STATE)
        if self.stage == 3:  # a universal checkpoint shares one step counter among groups, and each would advance it
            for state in self._engine.optimizer.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])

    def checksums(self) -> dict[str, str]:
        """Returns a hash of all `trained` and one of all `frozen` parameters. All ranks call it.

        The hashes depend on neither the ZeRO stage nor the number of ranks.
        """
        trained = self._checksum(trained=True)
        self._frozen_checksum = self._frozen_checksum or self._checksum(trained=False)
        return {"trained": trained, "frozen": self._frozen_checksum}

    def _checksum(self, *, trained: bool) -> str:
        sums = {}
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad != trained:
                continue
            if self.stage == 3:
                with local_partition(parameter) as partition:
                    first = self._torch.distributed.get_rank() * len(partition)
                    unpadded = partition[: max(0, parameter.ds_numel - first)]  # the last partition is padded
                    sums[name] = checksum(unpadded, first)
            else:
                sums[name] = checksum(parameter, 0)
        values = self._torch.tensor(list(sums.values()), dtype=self._torch.int64)
        if self.stage == 3:
            self._torch.distributed.all_reduce(values, group=self._control)
        pairs = sorted(zip(sums, values.tolist(), strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """Returns the whole model on rank 0 (CPU, the model's precision), None elsewhere. All ranks call it."""
        state = self._engine.module.state_dict()
        if self.stage == 3:
            state.update(self._gather_parameters())
        if self._torch.distributed.get_rank() != 0:
            return None
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def _gather_parameters(self) -> dict[str, torch.Tensor]:
        """Returns the partitioned parameters, whole, on rank 0, whose device holds one at a time; nothing elsewhere."""
        whole: dict[Any, torch.Tensor] = {}
        self._engine.optimizer.checkpoint_event_prologue()  # drops the full copies that every rank keeps of small ones
        for parameter in self._engine.module.parameters():
            with gathered([parameter]):
                if self._torch.distributed.get_rank() == 0:
                    whole[parameter] = parameter.detach().to("cpu", copy=True)
        self._engine.optimizer.checkpoint_event_epilogue()  # gathers those copies again
        names = self._engine.module.named_parameters(remove_duplicate=False)  # the names of a tied weight share a copy
        return {name: whole[parameter] for name, parameter in names if parameter in whole}

    def close(self) -> None:
        """Frees memory and hooks; the process group stays."""
        self._engine.destroy()
        if self._control is not None:
            self._torch.distributed.destroy_process_group(self._control)
