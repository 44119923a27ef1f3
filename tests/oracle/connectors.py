"""The oracle's connectors: features of one clip -> audio tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.cross_attention import cross_attention, layer_norm, mlp
from tests.oracle.language_model import Weights, linear


@dataclass(frozen=True)
class Connector:
    """The oracle's version of `pipeline.core.streams.Connector`.

    Attributes:
        grids: (time, frequency) cells per window of each encoder, for `lfst`.
    """

    kind: str
    summary_stride: int = 1
    num_layers: int = 0
    num_heads: int = 0
    grids: tuple[tuple[int, int], ...] = ()


def audio_tokens(
    connector: Connector, weights: Weights, clip: Mapping[str, Tensor], encoders: tuple[str, ...]
) -> list[Tensor]:
    """Returns the audio tokens of a clip."""
    frames = list(clip[encoders[0]])
    if connector.kind == "linear":
        return [linear(weights, "project", frame) for frame in frames]
    if connector.kind == "mlp":
        return [mlp(weights, "project", frame) for frame in frames]
    if connector.kind == "conv":
        return conv(connector.summary_stride, weights, frames)
    if connector.kind == "qformer":
        return qformer(connector, weights, frames)
    return lfst(connector, weights, [list(clip[name]) for name in encoders])


def conv(stride: int, weights: Weights, frames: list[Tensor]) -> list[Tensor]:
    """Merges every `stride` frames, one matrix for each offset, with zeros after the end; then applies an MLP."""
    tokens = []
    for start in range(0, len(frames), stride):
        merged = weights["conv.bias"]
        for offset in range(stride):
            frame = frames[start + offset] if start + offset < len(frames) else torch.zeros_like(frames[0])
            merged = merged + weights["conv.weight"][:, :, offset] @ frame
        tokens.append(mlp(weights, "project", merged))
    return tokens


def frames_covered(connector: Connector, token: int, frames: int) -> int:
    """Returns how many frames of the clip precede the end of this token (linear, mlp, conv)."""
    return min((token + 1) * connector.summary_stride, frames)


def qformer(connector: Connector, weights: Weights, frames: list[Tensor]) -> list[Tensor]:
    """Lets queries attend to each other, in every second block to the frames, then an FFN; norms follow each sum."""
    keys = [layer_norm(weights, "frames_norm", linear(weights, "frames_in", frame)) for frame in frames]
    xs = list(weights["queries"])

    def attend(name: str, norm: str, keys: Sequence[Tensor]) -> list[Tensor]:
        attended = [cross_attention(weights, name, connector.num_heads, x, keys, keys) for x in xs]
        return [layer_norm(weights, norm, x + y) for x, y in zip(xs, attended, strict=True)]

    for block in range(connector.num_layers):
        prefix = f"blocks.{block}"
        xs = attend(f"{prefix}.self_attention", f"{prefix}.self_norm", xs)
        if block % 2 == 0:
            xs = attend(f"{prefix}.cross_attention", f"{prefix}.cross_norm", keys)
        xs = [layer_norm(weights, f"{prefix}.ffn_norm", x + mlp(weights, f"{prefix}.ffn", x)) for x in xs]
    return [mlp(weights, "project", x) for x in xs]


def lfst(connector: Connector, weights: Weights, features: list[list[Tensor]]) -> list[Tensor]:
    """Lets a latent in each cell of the query grid attend to its window of every grid; a newline ends each time step.

    The query grid has the fewest times and the fewest frequencies of the encoders' grids. Time-major features.
    """
    times = min(grid[0] for grid in connector.grids)
    bands = min(grid[1] for grid in connector.grids)
    projected = [
        [layer_norm(weights, f"encoders_in.{i}.1", mlp(weights, f"encoders_in.{i}.0", frame)) for frame in frames]
        for i, frames in enumerate(features)
    ]
    context = sum(projected[0], torch.zeros_like(projected[0][0])) / len(projected[0])
    window_times = [grid[0] // times for grid in connector.grids]
    window_bands = [grid[1] // bands for grid in connector.grids]
    steps = -(-len(features[0]) // connector.grids[0][1] // window_times[0])

    tokens = []
    for step in range(steps):
        for band in range(bands):
            window: list[tuple[int, Tensor]] = []  # (encoder, frame in the window of this cell)
            for i, (_, frequencies) in enumerate(connector.grids):
                for cell in range(window_times[i] * window_bands[i]):
                    time = step * window_times[i] + cell // window_bands[i]
                    frame = time * frequencies + band * window_bands[i] + cell % window_bands[i]
                    if frame < len(projected[i]):
                        x = projected[i][frame]
                        if f"window_positions.{i}" in weights:
                            x = x + weights[f"window_positions.{i}"][cell]
                        window.append((i, x))
            x = weights["latent"]
            for layer in range(connector.num_layers):
                x = lfst_layer(connector, weights, f"layers.{layer}", x, context, window)
            tokens.append(mlp(weights, "project", x))
        tokens.append(weights["newline"])
    return tokens


def lfst_layer(
    connector: Connector, weights: Weights, name: str, x: Tensor, context: Tensor, window: list[tuple[int, Tensor]]
) -> Tensor:
    """q = W [x ; W context]; x + MLP(norm(q + Attention(norm q, norm K, norm V))), the norms of K and V per encoder."""
    q = linear(weights, f"{name}.query_in", torch.cat([x, linear(weights, f"{name}.context_in", context)]))
    keys = [layer_norm(weights, f"{name}.key_norms.{i}", frame) for i, frame in window]
    values = [layer_norm(weights, f"{name}.value_norms.{i}", frame) for i, frame in window]
    normed = layer_norm(weights, f"{name}.query_norm", q)
    q = q + cross_attention(weights, f"{name}.attention", connector.num_heads, normed, keys, values)
    return x + mlp(weights, f"{name}.ffn", layer_norm(weights, f"{name}.norm", q))
