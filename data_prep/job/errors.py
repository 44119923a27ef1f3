"""The failure of a preparation at run time."""

from __future__ import annotations


class PreparationFailed(RuntimeError):
    """A failure at run time that the manifest or config need not be to blame for; its message is one line."""
