"""Places of queries and keys: position, segment and kind, in rows. What the visibility rule reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def send(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. What comes from the host is pinned first: a copy from other memory waits for the device."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


@dataclass(frozen=True)
class Places:
    """What the visibility rule reads of queries or keys; every tensor is (B, N).

    Attributes:
        position: int64; -1 where not valid.
        segment: int64; 0 = shared prefix of the row.
        valid: bool; False for padding.
        audio: bool; True for audio tokens.
    """

    position: Tensor
    segment: Tensor
    valid: Tensor
    audio: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Places:
        """The function on every tensor."""
        return Places(*(function(getattr(self, f.name)) for f in fields(self)))

    def to(self, device: torch.device) -> Places:
        return self.map(lambda x: send(x, device))

    def expand(self, rows: int) -> Places:
        """The same places for each of `rows` rows, where there is but one."""
        return self.map(lambda x: x.expand(rows, -1))

    def pick(self, rows: Tensor) -> Places:
        """These rows, in this order."""
        return self.map(lambda x: x[rows])

    @staticmethod
    def concat(parts: Sequence[Places]) -> Places:
        """Keys of several origins in one memory order."""
        return Places(*(torch.cat([getattr(p, f.name) for p in parts], dim=1) for f in fields(Places)))


@dataclass(frozen=True)
class AudioPlaces:
    """The keys beside the sequence that one set of streams gives.

    Attributes:
        places: (B, S), padded on the right.
        source: (B, S) index into the flat tokens of these streams, one stream after the other.
        regular: `source` only cuts the flat tokens into rows of equal length, so a view does.
    """

    places: Places
    source: Tensor
    regular: bool

    def rows(self, flat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Flat keys and values, (N, heads, head_dim) each, sorted into rows: (B, S, heads, head_dim)."""
        first, second = flat
        if self.regular:
            return first.unflatten(0, self.source.shape), second.unflatten(0, self.source.shape)
        return first[self.source], second[self.source]

    def shared(self) -> AudioPlaces:
        """One row in place of all, if all rows are the same (many questions about one clip)."""
        tables = (self.source, self.places.position, self.places.segment, self.places.valid)
        if not all(bool((t == t[:1]).all()) for t in tables):
            return self
        return AudioPlaces(self.places.map(lambda x: x[:1]), self.source[:1], False)

    def pick(self, rows: Tensor) -> AudioPlaces:
        """These rows, in this order; places that all rows share stay one row."""
        if len(self.source) == 1:
            return self
        return AudioPlaces(self.places.pick(rows), self.source[rows], False)

    def hide(self) -> AudioPlaces:
        """The same keys, seen by no query."""
        places = replace(self.places, valid=torch.zeros_like(self.places.valid))
        return replace(self, places=places)

    def to(self, device: torch.device) -> AudioPlaces:
        return AudioPlaces(self.places.to(device), send(self.source, device), self.regular)


def place_beside(key: tuple[int, ...], flats: Sequence[Tensor], counts: Sequence[int], batch: int) -> AudioPlaces:
    """Sorts the flat tokens of these streams into rows, padded on the right."""
    base = 0
    parts = []
    for i in key:
        part = flats[i].clone()
        part[:, 3] += base
        base += counts[i]
        parts.append(part)
    flat = torch.cat(parts)
    flat = flat[flat[:, 0].argsort(stable=True)]
    row = flat[:, 0]
    per_row = torch.bincount(row, minlength=batch)
    width = max(int(per_row.max()), 1)
    column = torch.arange(len(row)) - (per_row.cumsum(0) - per_row)[row]
    tables = torch.zeros(3, batch, width, dtype=torch.long)
    tables[:, row, column] = flat[:, 1:].T
    valid = torch.zeros(batch, width, dtype=torch.bool)
    valid[row, column] = True
    position = torch.where(valid, tables[0], 0)
    regular = bool(valid.all()) and len(row) == base and torch.equal(flat[:, 3], torch.arange(base))
    return AudioPlaces(Places(position, tables[1], valid, torch.ones_like(valid)), tables[2], regular)
