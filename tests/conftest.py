"""Fixtures shared by tests of several packages, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.exported_models import write_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip.flac`, its features in `set` and an untrained PAL in `model`; tests only read it."""
    return write_model(tmp_path_factory.mktemp("exported"), "pal_v3")
