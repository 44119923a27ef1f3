"""Tests the work on partitions in one process: invalid files of every kind, long files, several encoders."""

import json

import numpy as np
import pytest
import soundfile

from data_prep.audio.windows import Windower
from data_prep.config import LogMelConfig
from data_prep.encoders.build import build_encoder, describe_encoder
from data_prep.job.mds_writer import read_partition
from pipeline.core.feature_contract import load_contract
from tests.helpers.corpora import clip_row, prepare_config, prepare_here, tone, write_manifest


def features(root, column="log_mel", partition=0) -> dict[str, np.ndarray]:
    return {s["clip_id"]: s["features"] for s in read_partition(root / column / f"part-{partition:05}")}


def test_each_invalid_file_is_rejected_with_its_reason(tmp_path):
    def wav(name, audio, rate_hz=16000, subtype="PCM_16"):
        soundfile.write(tmp_path / name, audio, rate_hz, subtype=subtype)

    good = tone(0.5, 16000)
    for name in ("good.wav", "header.wav", "cut.wav", "extension.wav"):
        wav(name, good)
    (tmp_path / "header.wav").write_bytes(b"\0\0\0\0" + (tmp_path / "good.wav").read_bytes()[4:])
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).normal(0, 0.1, 24000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:20000])
    (tmp_path / "extension.wav").rename(tmp_path / "extension.mp3")
    wav("none.wav", np.zeros(0))
    wav("one.wav", np.zeros(1))
    wav("nan.wav", np.where(np.arange(8000) == 4000, np.nan, 0.1), subtype="FLOAT")
    wav("long.wav", tone(3.0, 16000))
    wav("rate192k.wav", tone(0.5, 192000), 192000)
    wav("channels8.wav", tone(0.5, 48000, channels=8), 48000)
    wav("bits24.wav", good, subtype="PCM_24")
    wav("odd_rate.wav", tone(0.5, 44101), 44101)
    expected = {
        "header.wav": "undecodable", "cut.flac": ("undecodable", "truncated"), "none.wav": "empty",
        "one.wav": "too_short", "nan.wav": "not_finite", "long.wav": "too_long", "../escape.wav": "outside_root",
        "gone.wav": "missing", "odd_rate.wav": "unsupported_rate",
    }  # fmt: skip
    accepted = ["good.wav", "extension.mp3", "rate192k.wav", "channels8.wav", "bits24.wav"]
    rows = [clip_row(name, name) for name in [*expected, *accepted, "good.wav"]]
    config = prepare_config(
        write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "set", max_clip_s=2, max_reject_fraction=0.7
    )
    prepare_here(config)
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").read_text().splitlines()]
    reasons = {reject["clip_id"]: reject["reason"] for reject in rejects}
    assert reasons.pop("good.wav") == "duplicate_id"
    assert reasons.keys() == expected.keys()
    assert {name: reason for name, reason in reasons.items() if reason not in expected[name]} == {}
    assert all(reject["detail"] for reject in rejects)
    stored = features(tmp_path / "set")
    assert list(stored) == accepted and all(f.shape == (13, 256) for f in stored.values())
    np.testing.assert_array_equal(stored["good.wav"], stored["extension.mp3"])
    np.testing.assert_allclose(stored["good.wav"], stored["bits24.wav"], atol=0.5)  # quantisation noise in silence
    assert load_contract(tmp_path / "set").rejected == 10


def test_a_file_of_many_segments_has_the_features_of_the_whole(tmp_path):
    rate_hz = 22050
    audio = np.random.default_rng(0).normal(0, 0.1, round(95.3 * rate_hz)).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", audio, rate_hz, subtype="FLOAT")
    manifest = write_manifest(tmp_path / "m.jsonl", [clip_row("long", "long.wav")])
    prepare_here(prepare_config(manifest, tmp_path / "set"))

    import torch
    from torchaudio.transforms import Resample

    encoder = build_encoder(LogMelConfig(), describe_encoder(LogMelConfig()), "cpu")
    resampled = Resample(rate_hz, 16000)(torch.from_numpy(audio)).numpy()
    windows = list(Windower(encoder).push(resampled, True))
    whole = np.concatenate(encoder.encode_windows([encoder.prepare(w) for w in windows], [w.samples for w in windows]))
    stored = features(tmp_path / "set")["long"]
    assert stored.shape == whole.shape == (-(-len(resampled) // 640), 256)
    np.testing.assert_allclose(stored, whole, atol=4e-3)  # one unit in the last place of float16 at 4


def test_several_encoders_encode_the_same_clips_at_their_own_rates(tmp_path):
    for i, seconds in enumerate((0.3, 1.0, 0.7)):
        soundfile.write(tmp_path / f"{i}.flac", tone(seconds, 44100), 44100)
    (tmp_path / "1.flac").write_bytes(b"")
    manifest = write_manifest(tmp_path / "m.jsonl", [clip_row(str(i), f"{i}.flac") for i in range(3)])
    encoders = {
        "narrow": {"kind": "log_mel", "sample_rate_hz": 8000, "num_mels": 40},
        "wide": {"kind": "log_mel", "sample_rate_hz": 48000, "frames_per_token": 1},
    }
    prepare_here(prepare_config(manifest, tmp_path / "set", encoders=encoders, max_reject_fraction=0.5))
    narrow, wide = (features(tmp_path / "set", name) for name in encoders)
    assert {name: f.shape for name, f in narrow.items()} == {"0": (8, 160), "2": (18, 160)}
    assert {name: f.shape for name, f in wide.items()} == {"0": (30, 64), "2": (70, 64)}


@pytest.mark.parametrize("batch_s", [0.1, 1.0, 1000.0])
def test_the_batch_size_does_not_change_log_mel_features(tmp_path, batch_s):
    for i in range(5):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.4 + 0.1 * i, 16000), 16000)
    manifest = write_manifest(tmp_path / "m.jsonl", [clip_row(str(i), f"{i}.wav") for i in range(5)])
    encoder = build_encoder(LogMelConfig(), describe_encoder(LogMelConfig()), "cpu")
    prepare_here(prepare_config(manifest, tmp_path / "set", batch_s=batch_s))
    for i, stored in enumerate(features(tmp_path / "set").values()):
        audio, _ = soundfile.read(tmp_path / f"{i}.wav", dtype="float32")
        (window,) = Windower(encoder).push(audio, True)
        (alone,) = encoder.encode_windows([encoder.prepare(window)], [window.samples])
        np.testing.assert_array_equal(stored, alone)
