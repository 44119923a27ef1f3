"""Finds, hashes and reads the weights of an encoder, and moves a model to its device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
ModuleT = TypeVar("ModuleT", bound="nn.Module")


def find_model(model: str, revision: str | None) -> Path:
    """Returns the local folder or file of a model; one of the Hub is downloaded first (no code, only weights and JSON).

    Raises:
        UserError: the name is neither a path nor a model of the Hub.
    """
    path = Path(model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except Exception as error:  # the Hub client raises a dozen kinds, offline or not
        raise UserError(
            f"model '{model}'",
            f"is not a local path and cannot be downloaded ({_short_message(error)})",
            "correct the name",
        ) from error


def weight_files(path: Path, names: str = "*") -> list[Path]:
    """Returns the files that hold tensors: safetensors where there are any, else pickled ones.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(path.glob(f"{names}{suffix}"))
        if files:
            return files
    raise UserError(path, f"holds no weights ({', '.join(WEIGHT_SUFFIXES)})", "give the folder of a model")


def weights_sha256(path: Path) -> str:
    """Returns the hash of all weight files of a model."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, model: Path) -> dict[str, Any]:
    """Reads a JSON file of a model's folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(model, f"has no readable {path.name}", "give the folder of a Hugging Face model") from error
    return values


def read_tensors(path: Path) -> dict[str, Any]:
    """Reads all tensors of a model by name, from safetensors or from pickles without code (whose nesting is kept).

    Raises:
        UserError: a damaged file, or a pickle that holds more than tensors and plain containers.
    """
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in weight_files(path):
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and safetensors each raise their own
            raise UserError(
                file, f"cannot be read as weights ({_short_message(error)})", "download it again"
            ) from error
    return tensors


def to_device(module: ModuleT, device: str, dtype: str, compiled: bool) -> ModuleT:
    """Freezes a module, moves it to a device and dtype, and optionally compiles it."""
    module = module.eval().requires_grad_(False).to(device=device, dtype=torch_dtype(dtype))
    if compiled:
        module.compile()
    return module


def torch_dtype(dtype: str) -> torch.dtype:
    """Returns the torch dtype of a config's `dtype`."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _short_message(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
