"""The process group as the launcher describes it. Every launcher's environment is read here and nowhere else."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Position of this process: global rank, ranks in all, rank on this node, ranks on this node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_ranks() -> Ranks:
    """Ranks from the environment of `deepspeed`, `torchrun` or a single process.

    Sets LOCAL_WORLD_SIZE, which mosaicml-streaming reads and the `deepspeed` launcher does not set (it sets
    LOCAL_SIZE): without it two ranks of a node take each other's shared memory. Call it before `streaming` is
    imported.

    Raises:
        RuntimeError: several ranks, and no way to tell how many of them share this node.
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


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
