"""Tests decoding: samples as they were written, by segment, and a reason for every file that is not audio."""

import contextlib
import itertools
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from data_prep.audio.decode import SEGMENT_S, AudioFile, Reject
from data_prep.audio.resample import Resampler
from tests.helpers.corpora import tone

NOBODY = 65534  # user id without any rights


def decode(path, rate_hz: int | None = None, max_clip_s: float | None = None) -> np.ndarray:
    with AudioFile(str(path), max_clip_s) as file:
        resampler = Resampler(file.sample_rate_hz, rate_hz or file.sample_rate_hz)
        return np.concatenate([resampler.push(samples, last) for samples, last in file.segments()])


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "FLOAT", 0.0),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-23),
    ],
)
def test_lossless_formats_decode_to_what_was_written(tmp_path, name, subtype, tolerance):
    audio = tone(0.5, 44100, channels=2)
    soundfile.write(tmp_path / name, audio, 44100, subtype=subtype)
    assert np.abs(decode(tmp_path / name) - audio[:, 0]).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "format", "subtype"), [("a.mp3", "MP3", None), ("a.ogg", "OGG", "VORBIS"), ("a.opus", "OGG", "OPUS")]
)
def test_lossy_formats_keep_length_and_waveform(tmp_path, name, format, subtype):
    audio = tone(2.0, 48000)[:, 0]
    soundfile.write(tmp_path / name, audio, 48000, format=format, subtype=subtype)
    decoded = decode(tmp_path / name)
    assert len(decoded) == len(audio)
    assert np.corrcoef(decoded, audio)[0, 1] > 0.99


def test_channels_are_averaged(tmp_path):
    audio = np.random.default_rng(0).normal(0, 0.1, (4000, 8)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", audio, 8000, subtype="FLOAT")
    np.testing.assert_allclose(decode(tmp_path / "a.wav"), audio.mean(axis=1), atol=1e-7)


def test_the_format_is_detected_by_content_not_by_extension(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(0.2, 16000), 16000)
    (tmp_path / "a.flac").rename(tmp_path / "a.mp3")
    assert len(decode(tmp_path / "a.mp3")) == 3200


@pytest.mark.parametrize("from_hz", [8000, 11025, 22050, 44100, 48000, 96000, 192000])
def test_resampling_by_segment_equals_resampling_whole(from_hz):
    audio = np.random.default_rng(1).normal(0, 0.3, 3 * from_hz + 17).astype(np.float32)
    whole = torchaudio.transforms.Resample(from_hz, 16000)(torch.from_numpy(audio)).numpy()
    resampler = Resampler(from_hz, 16000)
    cuts = [0, 5, from_hz // 3, from_hz, 2 * from_hz + 1, len(audio)]
    parts = [resampler.push(audio[a:b], b == len(audio)) for a, b in itertools.pairwise(cuts)]
    assert len(whole) == math.ceil(len(audio) * 16000 / from_hz)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-6)


def test_a_long_file_comes_in_segments(tmp_path):
    rate_hz = 1000
    soundfile.write(tmp_path / "a.wav", np.zeros(int(2.5 * SEGMENT_S * rate_hz)), rate_hz)
    with AudioFile(str(tmp_path / "a.wav"), None) as file:
        lengths = [(len(samples), last) for samples, last in file.segments()]
    full = SEGMENT_S * rate_hz
    assert lengths == [(full, False), (full, False), (full // 2, True)]


def wav(path, audio, rate_hz=16000, subtype="PCM_16"):
    soundfile.write(path, audio, rate_hz, subtype=subtype)


def truncated_flac(path):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 160000), 16000)
    path.write_bytes(path.read_bytes()[:-100000])


def corrupt_header(path):
    wav(path, tone(1, 16000))
    path.write_bytes(b"JUNK" + path.read_bytes()[4:])


MAKERS = {
    "missing": lambda path: None,
    "undecodable": corrupt_header,
    "empty": lambda path: wav(path, np.zeros(0)),
    "too_short": lambda path: wav(path, np.zeros(1)),
    "too_long": lambda path: wav(path, np.zeros(5 * 16000)),
    "not_finite": lambda path: wav(path, np.array([0.0] * 8000 + [np.nan] + [0.0] * 8000), subtype="FLOAT"),
    "unsupported_rate": lambda path: wav(path, np.zeros(44101), rate_hz=44101),
}


@pytest.mark.parametrize("reason", MAKERS)
def test_each_fault_has_its_reason(tmp_path, reason):
    path = tmp_path / "a.wav"
    MAKERS[reason](path)
    with pytest.raises(Reject) as reject:
        decode(path, 16000, max_clip_s=4)
    assert reject.value.reason == reason


def test_a_truncated_file_is_rejected(tmp_path):
    truncated_flac(tmp_path / "a.flac")
    with pytest.raises(Reject) as reject:
        decode(tmp_path / "a.flac")
    assert reject.value.reason in ("truncated", "undecodable")


def test_a_folder_and_random_bytes_are_not_audio(tmp_path):
    (tmp_path / "d.wav").mkdir()
    (tmp_path / "n.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    for name, reason in (("d.wav", "unreadable"), ("n.mp3", "undecodable")):
        with pytest.raises(Reject) as reject:
            decode(tmp_path / name)
        assert reject.value.reason == reason


def test_a_file_without_permission_is_unreadable():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to everybody else
        file = Path(folder) / "a.wav"
        wav(file, tone(1, 16000))
        file.chmod(0)
        Path(folder).chmod(0o755)
        with not_as_root(), pytest.raises(Reject, match="unreadable"):
            decode(file)


@contextlib.contextmanager
def not_as_root():
    """Drops the rights of root, which can read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_unusual_rates_and_channel_counts_are_decoded(tmp_path):
    for name, rate_hz, channels, subtype in (("hi", 192000, 1, "PCM_24"), ("many", 48000, 8, "PCM_16")):
        wav(tmp_path / f"{name}.wav", tone(0.5, rate_hz, channels=channels), rate_hz, subtype)
        assert len(decode(tmp_path / f"{name}.wav", 16000)) == 8000
