"""The base class of config sections and of records that are written to files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A typed tree of values that rejects unknown keys and is immutable after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
