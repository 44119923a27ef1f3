"""The contract of a feature set survives its file, and features that do not match it are refused."""

import json
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import (
    CONTRACT_FILE,
    EncoderContract,
    FeatureContract,
    load_contract,
    require_encoders,
    require_same_features,
)

LOG_MEL = EncoderContract(kind="log_mel", revision="1", sample_rate_hz=16000, frame_rate_hz=25.0, width=256)


def contract(**changes: object) -> FeatureContract:
    encoder = LOG_MEL.model_copy(update=changes)
    return FeatureContract(
        encoders={"log_mel": encoder}, clips=2, questions=12, rejected=0, audio_hours=0.1, manifest_sha256="0" * 64
    )


def test_the_contract_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / CONTRACT_FILE).write_text(contract().dump())
    assert load_contract(tmp_path) == contract()


@pytest.mark.parametrize(
    "changes",
    [{"width": 128}, {"revision": "2"}, {"options": {"hop_ms": 20}}, {"weights_sha256": "ab"}, {"window_s": 1.0}],
)
def test_every_setting_that_changes_features_changes_the_fingerprint(changes: dict[str, object]) -> None:
    assert contract(**changes).fingerprint != contract().fingerprint


def test_software_versions_do_not_change_the_fingerprint() -> None:
    assert contract(software={"torch": "2.12"}).fingerprint == contract().fingerprint


def test_missing_and_damaged_contracts_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_contract(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a finished feature set"):
        load_contract(tmp_path)
    path = tmp_path / CONTRACT_FILE
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_contract(tmp_path)
    values = json.loads(contract().dump())
    values["encoders"]["log_mel"]["width"] = 512
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="does not match its own fingerprint"):
        load_contract(tmp_path)


def test_features_of_another_encoder_are_refused() -> None:
    with pytest.raises(UserError, match="holds features of log_mel, not of 'whisper'"):
        require_encoders(contract(), ["whisper"], "shards")
    expected = {"log_mel": LOG_MEL.fingerprint}
    require_same_features(expected, contract(), "shards", "the model")
    with pytest.raises(UserError, match=r"shards: features of 'log_mel' have fingerprint .* the model was made with"):
        require_same_features(expected, contract(width=128), "shards", "the model")
