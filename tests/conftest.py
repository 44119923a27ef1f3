"""What tests of several modules share, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.exported_models import write_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip.flac`, its features in `set`, and an untrained PAL in `model`; nobody writes into it."""
    return write_model(tmp_path_factory.mktemp("exported"), "pal_v3")
