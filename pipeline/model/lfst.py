"""The `lfst` connector: Cambrian-1's spatial vision aggregator (arXiv 2406.16860, section 3) on a sound's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.core.streams import Connector
from pipeline.model.audio_connector import AudioConnector, Grid, block_sizes
from pipeline.model.layers import CrossAttention, Mlp
from pipeline.model.positions import to_device

QUERY_GRID = (32, 2)  # (time, frequency) cells per window; with the newlines, 96 tokens for a window of 10 s


@dataclass(frozen=True)
class LfstGrids:
    """How the cells of the encoders' grids lie below the query grid, per window.

    Attributes:
        steps, bands: time steps and frequency bands of the query grid.
        encoders: (time, frequency) cells of each encoder.
    """

    steps: int
    bands: int
    encoders: tuple[tuple[int, int], ...]

    @classmethod
    def of_encoders(cls, encoder_grids: Sequence[Grid]) -> LfstGrids:
        """Returns the query grid: 32 x 2 where every encoder's grid divides into it, else the smallest of each axis.

        Raises:
            UserError: an encoder without a grid, or a grid that does not divide into the query grid.
        """
        grids = tuple((grid[0], grid[1]) for grid in encoder_grids if grid is not None)
        if len(grids) < len(encoder_grids):
            raise UserError("encoder_grids", "lfst reads encoders whose output is a grid", "give each encoder's grid")
        steps, bands = QUERY_GRID
        if any(t % steps or f % bands for t, f in grids):
            steps, bands = min(t for t, _ in grids), min(f for _, f in grids)
        if any(t % steps or f % bands for t, f in grids):
            raise UserError("encoder_grids", f"{grids} do not divide into {steps} x {bands} cells", "use qformer")
        return cls(steps, bands, grids)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """For each encoder the (time, frequency) cells that one query cell reads."""
        return [(t // self.steps, f // self.bands) for t, f in self.encoders]

    @property
    def tokens_per_step(self) -> int:
        """One token for each band, and the newline."""
        return self.bands + 1

    def count_steps(self, frames: Sequence[int]) -> int:
        """Returns the time steps of the query grid for a clip with these frames; the first encoder sets them."""
        frames_per_step = self.windows[0][0] * self.encoders[0][1]
        return -(-frames[0] // frames_per_step)


class LfstLayer(nn.Module):
    """Each cell attends to its own window of every encoder; the query also sees the mean of the clip."""

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

    def forward(self, x_GD: Tensor, mean_GD: Tensor, windows: Sequence[Tensor], mask_GK: Tensor) -> Tensor:
        """Returns the next state of the cells.

        Args:
            x_GD, mean_GD: state of each cell, and the mean of its clip.
            windows: for each encoder (cells, window, hidden).
            mask_GK: True for the frames of all windows that exist.
        """
        q_GD = self.query_in(torch.cat([x_GD, self.context_in(mean_GD)], dim=-1))
        keys_GKD = torch.cat([norm(window) for norm, window in zip(self.key_norms, windows, strict=True)], dim=1)
        values_GKD = torch.cat([norm(window) for norm, window in zip(self.value_norms, windows, strict=True)], dim=1)
        keys_values = self.attention.keys_values(keys_GKD, values_GKD)
        out_GD = self.attention.attend(self.query_norm(q_GD)[:, None], keys_values, mask_GK[:, None])[:, 0]
        return x_GD + self.ffn(self.norm(q_GD + out_GD))


class LfstConnector(AudioConnector):
    """One learnable latent in every cell of the query grid, a newline token after each time step, an MLP to the width.

    Args:
        encoder_grids: (time, frequency) cells per window of each encoder; features are in time-major order.

    Raises:
        UserError: see `LfstGrids.of_encoders` and `block_sizes`.
    """

    def __init__(
        self, spec: Connector, encoder_widths: Sequence[int], encoder_grids: Sequence[Grid], width: int
    ) -> None:
        super().__init__(spec, encoder_grids)
        self.grids, sizes = LfstGrids.of_encoders(encoder_grids), block_sizes(spec)
        windows, hidden = self.grids.windows, sizes.hidden
        self.encoders_in = nn.ModuleList(nn.Sequential(Mlp(w, hidden), nn.LayerNorm(hidden)) for w in encoder_widths)
        self.window_positions = nn.ParameterDict(  # by encoder; a window of one cell needs none
            {str(e): nn.Parameter(torch.empty(t * f, hidden)) for e, (t, f) in enumerate(windows) if t * f > 1}
        )
        self.latent = nn.Parameter(torch.empty(hidden))
        self.layers = nn.ModuleList(
            LfstLayer(hidden, sizes.heads, [t * f for t, f in windows]) for _ in range(sizes.layers)
        )
        self.project = Mlp(hidden, width)
        self.newline = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        for parameter in (self.latent, self.newline, *self.window_positions.values()):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    @staticmethod
    def count_tokens(spec: Connector, encoder_grids: Sequence[Grid], frames: Sequence[int]) -> int:
        grids = LfstGrids.of_encoders(encoder_grids)
        return grids.count_steps(frames) * grids.tokens_per_step

    def frames_of_a_step(self) -> list[int]:
        """Returns for each encoder the fewest frames that the connector can read: all bands of one time."""
        return [bands for _, bands in self.grids.encoders]

    def time_steps(self, lengths: Sequence[Tensor]) -> Tensor:
        """Returns the (num_clips,) time steps of the query grid.

        Raises:
            UserError: a clip whose frames are not whole time steps of an encoder's grid.
        """
        for length, (_, bands) in zip(lengths, self.grids.encoders, strict=True):
            if bool((length % bands).any()):
                fault = f"{length.tolist()} are not whole steps of {bands} bands"
                raise UserError("audio_lengths", fault, "prepare them again")
        return self.token_counts(lengths) // self.grids.tokens_per_step

    def forward(self, features: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """Returns the audio tokens of all clips, (total_tokens, width).

        Args:
            features: for each encoder (total_frames, encoder_width).
            lengths: for each encoder (num_clips,) frames of the clips, on the CPU.
        """
        steps_C = self.time_steps(lengths)
        bands, device = self.grids.bands, features[0].device
        clip_of_step = torch.repeat_interleave(torch.arange(len(steps_C)), steps_C)
        step_in_clip = torch.arange(len(clip_of_step)) - (steps_C.cumsum(0) - steps_C)[clip_of_step]
        windows, masks = [], []
        for e, (x_NW, n) in enumerate(zip(features, lengths, strict=True)):
            h_ND = self.encoders_in[e](x_NW)
            if e == 0:
                clip_of_frame = to_device(torch.repeat_interleave(torch.arange(len(n)), n), device)
                sums = torch.zeros(len(n), h_ND.shape[1], dtype=h_ND.dtype, device=device)
                mean_CD = sums.index_add(0, clip_of_frame, h_ND) / to_device(n, device)[:, None]
            window_GKD, mask_GK = self._windows(e, h_ND, n, clip_of_step, step_in_clip)
            windows.append(window_GKD)
            masks.append(mask_GK)
        mean_GD = mean_CD[to_device(clip_of_step, device)].repeat_interleave(bands, dim=0)
        x_GD = self.latent.expand(len(mean_GD), -1)
        for layer in self.layers:
            x_GD = layer(x_GD, mean_GD, windows, to_device(torch.cat(masks, dim=1), device))
        tokens = self.project(x_GD).unflatten(0, (-1, bands))  # (steps, bands, W)
        newlines = self.newline.expand(len(tokens), 1, -1)
        return torch.cat([tokens, newlines], dim=1).flatten(0, 1)

    def _windows(
        self, encoder: int, h_ND: Tensor, lengths: Tensor, clip_of_step: Tensor, step_in_clip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the (cells, window, hidden) frames of one encoder that each cell reads, and which of them exist."""
        (w_t, w_f), (_, bands) = self.grids.windows[encoder], self.grids.encoders[encoder]
        begin = lengths.cumsum(0) - lengths
        time = step_in_clip[:, None] * w_t + torch.arange(w_t)  # (steps, w_t)
        present = time < (lengths // bands)[clip_of_step][:, None]
        frame = (begin[clip_of_step][:, None] + time * bands)[:, :, None] + torch.arange(bands)  # (steps, w_t, bands)
        frame = torch.where(present[:, :, None], frame, 0)
        cells_GK = frame.unflatten(2, (self.grids.bands, w_f)).transpose(1, 2).reshape(-1, w_t * w_f)
        mask_GK = present[:, None, :, None].expand(-1, self.grids.bands, -1, w_f).reshape(-1, w_t * w_f)
        window_GKD = h_ND[to_device(cells_GK, h_ND.device)]
        if str(encoder) in self.window_positions:
            window_GKD = window_GKD + self.window_positions[str(encoder)]
        return window_GKD, mask_GK
