"""DeepSpeed's interface for storing checkpoints (`CheckpointEngine`), implemented to collect the files in memory.

Imports DeepSpeed when it is loaded, which takes seconds: import it inside functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from pipeline.engine.host_copy import copy_to_host


class CollectingCheckpointEngine(TorchCheckpointEngine):
    """Collects what DeepSpeed saves, instead of writing it.

    Args:
        files: receives the content of each file by its path.
        copied: copy tensors to host memory.
    """

    def __init__(self, files: dict[Path, Any], *, copied: bool) -> None:
        super().__init__()
        self._files, self._copied = files, copied

    def save(self, state_dict: Any, path: str) -> None:
        self._files[Path(path)] = copy_to_host(state_dict) if self._copied else state_dict
