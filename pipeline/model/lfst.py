"""The `lfst` connector: Cambrian-1's spatial vision aggregator (arXiv 2406.16860, section 3) on a sound's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector
from pipeline.model.layers import CrossAttention, Mlp
from pipeline.model.positions import to_device

# Sizes of Cambrian-1; the query grid is (time, frequency) cells per window, 96 tokens in 10 s with the newlines.
LFST_LAYERS, LFST_HEADS, LFST_HIDDEN_SIZE = 3, 16, 1024
LFST_GRID = (32, 2)


def query_grid(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid of queries: 32 x 2 where every encoder's grid divides into it, else the smallest of each axis."""
    if all(t % LFST_GRID[0] == 0 and f % LFST_GRID[1] == 0 for t, f in grids):
        return LFST_GRID
    return min(t for t, _ in grids), min(f for _, f in grids)


class LfstLayer(nn.Module):
    """Each cell, knowing the mean of its clip, attends to its own window of every encoder."""

    def __init__(self, hidden: int, num_heads: int, window_sizes: Sequence[int]) -> None:
        super().__init__()
        self.context_in = nn.Linear(hidden, hidden, bias=False)
        self.query_in = nn.Linear(2 * hidden, hidden, bias=False)
        self.query_norm = nn.LayerNorm(hidden)
        self.key_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in window_sizes)
        self.value_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in window_sizes)
        self.attention = CrossAttention(hidden, hidden, hidden, num_heads, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.ffn = Mlp(hidden, hidden, bias=False)
        self.window_sizes = list(window_sizes)

    def forward(self, x_RH: Tensor, context_RH: Tensor, windows: Sequence[Tensor], seen_RK: Tensor) -> Tensor:
        q_RH = self.query_in(torch.cat([x_RH, self.context_in(context_RH)], dim=-1))
        keys = torch.cat([norm(w) for norm, w in zip(self.key_norms, windows, strict=True)], dim=1)
        values = torch.cat([norm(w) for norm, w in zip(self.value_norms, windows, strict=True)], dim=1)
        keys_values = self.attention.keys_values(keys, values)
        heard = self.attention.attend(self.query_norm(q_RH)[:, None], keys_values, seen_RK[:, None])[:, 0]
        return x_RH + self.ffn(self.norm(q_RH + heard))


class LfstConnector(nn.Module):
    """One learnable latent in every cell of the query grid, a newline token after each time step, an MLP to the width.

    Args:
        encoder_grids: (time, frequency) cells per window of each encoder; features are in time-major order.

    Raises:
        UserError: an encoder without a grid, or a grid that does not divide into the query grid.
    """

    def __init__(
        self,
        spec: Connector,
        encoder_widths: Sequence[int],
        encoder_grids: Sequence[Sequence[int] | None],
        width: int,
    ) -> None:
        super().__init__()
        grids = [(grid[0], grid[1]) for grid in encoder_grids if grid is not None]
        if len(grids) < len(encoder_grids):
            raise UserError("encoder_grids", "lfst reads encoders whose output is a grid", "give each encoder's grid")
        self.steps, self.bands = query_grid(grids)
        if any(t % self.steps or f % self.bands for t, f in grids):
            raise UserError(
                "encoder_grids", f"{grids} do not divide into {self.steps} x {self.bands} cells", "use qformer"
            )
        hidden = spec.hidden_size or LFST_HIDDEN_SIZE
        heads = spec.num_heads or LFST_HEADS
        if hidden % heads:
            raise UserError("model.connector.num_heads", f"{heads} does not divide hidden_size {hidden}", "change one")
        self.windows = [(t // self.steps, f // self.bands) for t, f in grids]
        self.encoder_bands = [f for _, f in grids]
        self.encoders_in = nn.ModuleList(nn.Sequential(Mlp(w, hidden), nn.LayerNorm(hidden)) for w in encoder_widths)
        self.window_positions = nn.ParameterDict(  # by encoder; a window of one cell needs none
            {str(e): nn.Parameter(torch.empty(t * f, hidden)) for e, (t, f) in enumerate(self.windows) if t * f > 1}
        )
        self.latent = nn.Parameter(torch.empty(hidden))
        self.layers = nn.ModuleList(
            LfstLayer(hidden, heads, [t * f for t, f in self.windows]) for _ in range(spec.num_layers or LFST_LAYERS)
        )
        self.project = Mlp(hidden, width)
        self.newline = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        for parameter in (self.latent, self.newline, *self.window_positions.values()):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def frames_of_a_step(self) -> list[int]:
        """For each encoder the fewest frames that the connector can read: all bands of one time."""
        return self.encoder_bands

    def time_steps(self, lengths: Sequence[Tensor]) -> Tensor:
        """(num_clips,) time steps of the query grid; the first encoder sets them.

        Raises:
            UserError: a clip whose frames are not whole time steps of an encoder's grid.
        """
        for n, bands in zip(lengths, self.encoder_bands, strict=True):
            if bool((n % bands).any()):
                raise UserError(
                    "audio_lengths", f"{n.tolist()} are not whole steps of {bands} bands", "prepare them again"
                )
        frames_per_step = self.windows[0][0] * self.encoder_bands[0]
        return -(-lengths[0] // frames_per_step)

    def token_counts(self, lengths: Sequence[Tensor]) -> Tensor:
        return self.time_steps(lengths) * (self.bands + 1)

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        steps = self.time_steps(lengths)
        device = features[0].device
        clip_of_step = torch.repeat_interleave(torch.arange(len(steps)), steps)
        step_in_clip = torch.arange(len(clip_of_step)) - (steps.cumsum(0) - steps)[clip_of_step]
        windows, seen = [], []
        for e, (x_NW, n) in enumerate(zip(features, lengths, strict=True)):
            h_NH = self.encoders_in[e](x_NW)
            if e == 0:
                clip_of_frame = to_device(torch.repeat_interleave(torch.arange(len(n)), n), device)
                sums = torch.zeros(len(n), h_NH.shape[1], dtype=h_NH.dtype, device=device)
                mean_CH = sums.index_add(0, clip_of_frame, h_NH) / to_device(n, device)[:, None]
            window, valid = self._windows(e, h_NH, n, clip_of_step, step_in_clip)
            windows.append(window)
            seen.append(valid)
        context_RH = mean_CH[to_device(clip_of_step, device)].repeat_interleave(self.bands, dim=0)
        x_RH = self.latent.expand(len(context_RH), -1)
        for layer in self.layers:
            x_RH = layer(x_RH, context_RH, windows, to_device(torch.cat(seen, dim=1), device))
        tokens_SBW = self.project(x_RH).unflatten(0, (-1, self.bands))
        newline = self.newline.expand(len(tokens_SBW), 1, -1)
        return torch.cat([tokens_SBW, newline], dim=1).flatten(0, 1)

    def _windows(
        self, encoder: int, h_NH: Tensor, lengths: Tensor, clip_of_step: Tensor, step_in_clip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(cells, window, hidden) frames that each cell sees of one encoder, and which of them are there."""
        (w_t, w_f), bands = self.windows[encoder], self.encoder_bands[encoder]
        begin = lengths.cumsum(0) - lengths
        time = step_in_clip[:, None] * w_t + torch.arange(w_t)  # (steps, w_t)
        valid = time < (lengths // bands)[clip_of_step][:, None]
        frame = (begin[clip_of_step][:, None] + time * bands)[:, :, None] + torch.arange(bands)  # (steps, w_t, bands)
        frame = torch.where(valid[:, :, None], frame, 0)
        cells = frame.unflatten(2, (self.bands, w_f)).transpose(1, 2).reshape(-1, w_t * w_f)
        seen = valid[:, None, :, None].expand(-1, self.bands, -1, w_f).reshape(-1, w_t * w_f)
        window = h_NH[to_device(cells, h_NH.device)]
        if str(encoder) in self.window_positions:
            window = window + self.window_positions[str(encoder)]
        return window, seen
