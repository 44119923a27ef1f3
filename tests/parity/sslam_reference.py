"""An independent float64 reference of SSLAM, written from its description, and random checkpoints in the three
published naming schemes. Shares no code with data_prep."""

from __future__ import annotations

import math

import numpy as np
import torch
from torchaudio.compliance import kaldi

ROWS, COLUMNS = 768, 8


def position_table(width: int) -> torch.Tensor:
    """Returns (1, 6144, width): half for the frequency column, half for the time row, each sines then cosines."""
    quarter = width // 4
    table = np.zeros((ROWS, COLUMNS, width))
    for half, index in ((0, np.arange(COLUMNS)[None, :, None]), (1, np.arange(ROWS)[:, None, None])):
        angle = index * 10000.0 ** (-np.arange(quarter) / quarter)
        start = half * 2 * quarter
        table[:, :, start : start + quarter] = np.sin(angle)
        table[:, :, start + quarter : start + 2 * quarter] = np.cos(angle)
    return torch.tensor(table.reshape(1, ROWS * COLUMNS, width), dtype=torch.float32)


def official_tensors(width: int, depth: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random weights under the names of the official checkpoint, including the decoder."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float | None = None) -> torch.Tensor:
        scale = scale if scale is not None else 1 / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else 1)
        return torch.randn(*shape, generator=generator) * scale

    image = "modality_encoders.IMAGE."
    tensors = {
        f"{image}extra_tokens": random(1, 1, width, scale=0.5),
        f"{image}local_encoder.proj.weight": random(width, 1, 16, 16),
        f"{image}local_encoder.proj.bias": random(width, scale=0.1),
        f"{image}fixed_positional_encoder.positions": position_table(width),
        f"{image}context_encoder.norm.weight": 1 + random(width, scale=0.1),
        f"{image}context_encoder.norm.bias": random(width, scale=0.1),
        f"{image}decoder.blocks.0.0.weight": random(width, 48, 3, 3),
        f"{image}decoder.proj.weight": random(width, width),
    }
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            tensors[f"blocks.{i}.{norm}.weight"] = 1 + random(width, scale=0.1)
            tensors[f"blocks.{i}.{norm}.bias"] = random(width, scale=0.1)
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in shapes.items():
            tensors[f"blocks.{i}.{name}.weight"] = random(*shape)
            tensors[f"blocks.{i}.{name}.bias"] = random(shape[0], scale=0.1)
    return tensors


def hugging_face_names(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in official.items():
        if ".decoder." not in name:
            name = name.removeprefix("modality_encoders.IMAGE.").replace("context_encoder.norm", "pre_norm")
            renamed[f"model.{name}"] = tensor
    return renamed


def features(official: dict[str, torch.Tensor], audio: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns (tokens, width) of one clip of 16 kHz audio, in windows of 1024 frames, without padding rows."""
    audio = torch.from_numpy(audio - audio.mean())[None]
    mel = kaldi.fbank(
        audio, htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning", num_mel_bins=128,
        dither=0.0, frame_shift=10,
    )  # fmt: skip
    out = []
    for start in range(0, len(mel), 1024):
        window = mel[start : start + 1024]
        padded = torch.zeros(1024, 128)
        padded[: len(window)] = window
        rows = math.ceil(len(window) / 16)
        out.append(_forward(official, (padded + 4.268) / (4.569 * 2), num_heads)[: rows * COLUMNS])
    return np.concatenate(out)


def _forward(official: dict[str, torch.Tensor], mel: torch.Tensor, num_heads: int) -> np.ndarray:
    w = {name.removeprefix("modality_encoders.IMAGE."): t.double().numpy() for name, t in official.items()}
    patches = mel.double().numpy().reshape(64, 16, 8, 16).transpose(0, 2, 1, 3).reshape(512, 256)
    kernel = w["local_encoder.proj.weight"]
    x = patches @ kernel.reshape(len(kernel), 256).T + w["local_encoder.proj.bias"]
    x = x + w["fixed_positional_encoder.positions"][0, :512]
    x = _norm(np.concatenate([w["extra_tokens"][0], x]), w, "context_encoder.norm")
    for i in range(sum(name.endswith("attn.qkv.bias") for name in w)):
        b = f"blocks.{i}."
        q, k, v = np.split(x @ w[f"{b}attn.qkv.weight"].T + w[f"{b}attn.qkv.bias"], 3, axis=1)
        heads = []
        for qh, kh, vh in zip(*(np.split(t, num_heads, axis=1) for t in (q, k, v)), strict=True):
            scores = qh @ kh.T / math.sqrt(qh.shape[1])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ vh)
        attention = np.concatenate(heads, axis=1) @ w[f"{b}attn.proj.weight"].T + w[f"{b}attn.proj.bias"]
        x = _norm(x + attention, w, f"{b}norm1")
        hidden = torch.from_numpy(x @ w[f"{b}mlp.fc1.weight"].T + w[f"{b}mlp.fc1.bias"])
        hidden = (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))).numpy()
        x = _norm(x + hidden @ w[f"{b}mlp.fc2.weight"].T + w[f"{b}mlp.fc2.bias"], w, f"{b}norm2")
    return x[1:]


def _norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]
