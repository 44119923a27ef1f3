"""The process group as a launcher describes it in the environment: where this process stands in it, and on which
device it may compute."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

ACCELERATOR_VARIABLE = "DS_ACCELERATOR"  # read by DeepSpeed


@dataclass(frozen=True)
class Ranks:
    """Position of this process in its group.

    Attributes:
        rank: global rank of this process.
        world_size: number of ranks on all nodes.
        local_rank: rank of this process on its node.
        local_world_size: number of ranks on its node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_ranks() -> Ranks:
    """Reads the position of this process from the environment of `deepspeed`, `torchrun` or no launcher at all.

    Sets LOCAL_WORLD_SIZE, which mosaicml-streaming reads and the `deepspeed` launcher does not set (it sets
    LOCAL_SIZE): without it, two ranks of a node would use the same shared memory. Call this before `streaming` is
    imported.

    Raises:
        RuntimeError: there are several ranks, and nothing says how many of them run on this node.
    """
    env = os.environ
    world_size = int(env.get("WORLD_SIZE", "1"))
    local_world_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
    if local_world_size is None:
        if world_size > 1:
            raise RuntimeError(
                "WORLD_SIZE is set but neither LOCAL_WORLD_SIZE nor LOCAL_SIZE: start with `pal train`, `deepspeed` "
                "or `torchrun`, or set LOCAL_WORLD_SIZE to the number of ranks on each node"
            )
        local_world_size = "1"
    env["LOCAL_WORLD_SIZE"] = local_world_size
    return Ranks(
        rank=int(env.get("RANK", "0")),
        world_size=world_size,
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_world_size=int(local_world_size),
    )


def is_rank() -> bool:
    """Returns whether a launcher started this process as a rank of a job."""
    return "RANK" in os.environ


def is_cpu_forced() -> bool:
    """Returns whether DS_ACCELERATOR, DeepSpeed's own variable, keeps ranks off the GPUs."""
    return os.environ.get(ACCELERATOR_VARIABLE) == "cpu"


def set_single_rank_environment() -> None:
    """Describes a process group of one rank to torch, if no launcher described one."""
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """Returns a TCP port that nothing on this machine is listening on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
