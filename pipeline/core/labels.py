"""The label of a token that carries no loss."""

from __future__ import annotations

IGNORE_INDEX = -100  # as in torch and transformers
