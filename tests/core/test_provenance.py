import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.core.provenance import language_model_identity


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": np.zeros(100_000, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_model_is_named_by_its_resolved_folder(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    identity = language_model_identity(str(link))
    assert identity == language_model_identity(str(model))
    assert identity["language_model"] == str(model.resolve())


def test_models_of_one_shape_with_other_weights_have_other_hashes(model: Path) -> None:
    untrained = language_model_identity(str(model))
    save_file({"weight": np.ones(100_000, np.float32)}, model / "model.safetensors")
    trained = language_model_identity(str(model))
    assert trained["language_model_hash"] != untrained["language_model_hash"]
    (model / "README.md").write_text("Notes do not count.")
    assert language_model_identity(str(model)) == trained


@pytest.mark.parametrize("name", ["org/absent-from-the-cache", "/no/such/folder"])
def test_a_model_that_is_not_here_has_its_name_alone(name: str) -> None:
    assert language_model_identity(name) == {"language_model": name}
