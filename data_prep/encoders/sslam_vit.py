"""The vision transformer of SSLAM and EAT (arXiv 2506.12222, 2401.03497), and the loading of their checkpoints.

Post-norm, fixed two-dimensional position embeddings, a leading CLS token; no relative bias, no final norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import UserError

PATCH = 16
NORM_EPS = 1e-6
IMAGE = "modality_encoders.IMAGE."  # what the published checkpoints call the audio modality


class Block(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + mlp(x))."""

    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = self.attn["qkv"](x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BTD = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK).transpose(1, 2).flatten(2)
        x_BTD = self.norm1(x_BTD + self.attn["proj"](mixed_BTD))
        return self.norm2(x_BTD + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x_BTD))))


class SslamViT(nn.Module):
    """Maps log-mel (B, frames, mels) to features (B, rows * columns, width), time-major; frames in multiples of 16."""

    def __init__(
        self, width: int, depth: int, hidden: int, num_heads: int, positions: int, columns: int = 128 // PATCH
    ) -> None:
        super().__init__()
        self.columns = columns
        self.proj = nn.Conv2d(1, width, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, positions, width), requires_grad=False)
        self.pre_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(Block(width, hidden, num_heads) for _ in range(depth))

    def forward(self, mel_BFM: Tensor, layer: int | None = None) -> Tensor:
        """Computes the output of a block without the CLS token.

        Args:
            layer: number of blocks to run; None means all.
        """
        x_BTD = self.proj(mel_BFM[:, None]).flatten(2).transpose(1, 2)
        x_BTD = x_BTD + self.positions[:, : x_BTD.shape[1]]
        x_BTD = self.pre_norm(torch.cat([self.cls.expand(len(x_BTD), -1, -1), x_BTD], dim=1))
        for block in self.blocks[:layer]:
            x_BTD = block(x_BTD)
        return x_BTD[:, 1:]


def load_sslam(checkpoint: dict[str, object], num_heads: int, where: object) -> SslamViT:
    """Builds a model in float32 from the tensors of a checkpoint.

    Args:
        checkpoint: the fairseq dict (its `model` entry is used without the teacher `_ema`), or the tensors of the
            Hugging Face folder.
        where: location of the checkpoint, for error messages.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; names it.
    """
    inner = checkpoint.get("model", checkpoint)
    tensors = {k: v.float() for k, v in inner.items() if isinstance(v, Tensor)} if isinstance(inner, dict) else {}
    tensors = {renamed: tensor for name, tensor in tensors.items() if (renamed := _model_name(name)) is not None}
    try:
        width, positions = tensors["cls"].shape[-1], tensors["positions"].shape[1]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(where, f"is not an SSLAM checkpoint (no {error.args[0]})", "check encoders.*.model") from error
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if width % num_heads:
        raise UserError("num_heads", f"{num_heads} does not divide the width {width} of {where}", "correct it")
    model = SslamViT(width, depth, hidden, num_heads, positions)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != shapes.get(name):
            fault = f"tensor {name} has shape {shape}, the model's is {shapes.get(name)}"
            raise UserError(where, fault, "give a checkpoint of SSLAM or EAT")
    model.load_state_dict(tensors)
    return model


def _model_name(name: str) -> str | None:
    """Returns the model's name of a checkpoint tensor; None for the pretraining decoder and the heads."""
    name = name.removeprefix("model.").removeprefix(IMAGE)
    if name.startswith(("decoder.", "fc_norm.", "head.")):
        return None
    for theirs, ours in (
        ("extra_tokens", "cls"),
        ("local_encoder.proj.", "proj."),
        ("fixed_positional_encoder.positions", "positions"),
        ("context_encoder.norm.", "pre_norm."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
