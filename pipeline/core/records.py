"""The base of every config section and of every record that is written to a file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A typed value tree: unknown keys are errors, and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
