"""Tests that the length of a clip is what decodes: a header that states another one is repaired or rejected."""

import io
import os

import numpy as np
import pytest
import soundfile

from data_prep.audio.decode import AudioFile, Reject
from tests.helpers.corpora import tone

RATE_HZ = 16000


def encoded(audio: np.ndarray, format: str = "WAV", **values) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, RATE_HZ, format=format, **values)
    return buffer.getvalue()


WAV = encoded(tone(1.0, RATE_HZ), subtype="PCM_16")
NOISE = np.random.default_rng(0).normal(0, 0.1, 4 * RATE_HZ).astype(np.float32)
NOISE[RATE_HZ : 3 * RATE_HZ] = 0  # bitrates differ, so that the size of the file does not determine its length
MP3 = encoded(NOISE, "MP3", bitrate_mode="VARIABLE", compression_level=0.5)
MP3_FRAME_S = 576 / RATE_HZ


def sized(data_bytes: int, riff_bytes: int | None = None) -> bytes:
    data = bytearray(WAV)
    at = data.index(b"data") + 4
    data[at : at + 4] = data_bytes.to_bytes(4, "little")
    if riff_bytes is not None:
        data[4:8] = riff_bytes.to_bytes(4, "little")
    return bytes(data)


def without_index(mp3: bytes) -> bytes:
    return mp3[mp3.index(mp3[:2], 10) :]


def flac_of_unknown_length() -> bytes:
    data = bytearray(encoded(tone(1.0, RATE_HZ), "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def decode(path, content: bytes | None = None) -> tuple[float, dict[str, str]]:
    """Returns the seconds that decode, which must be the duration, and the notes."""
    if content is not None:
        path.write_bytes(content)
    with AudioFile(str(path), None) as file:
        seconds = sum(len(samples) for samples, _ in file.segments()) / file.sample_rate_hz
        assert file.duration_s == seconds
        return seconds, file.notes


def rejected(path, content: bytes | None = None) -> Reject:
    with pytest.raises(Reject) as reject:
        decode(path, content)
    return reject.value


@pytest.mark.parametrize(
    "content",
    [
        sized(0xFFFFFFFF, 0xFFFFFFFF),
        sized(0x7FFFF000, 0x7FFFF024),
        sized(0x80000000, 0x80000024),
        sized(0, 4088),
        sized(0, 0),
        flac_of_unknown_length(),
    ],
    ids=["ffmpeg", "sox", "arecord", "killed", "killed at once", "flac"],
)
def test_audio_of_unknown_length_is_read_to_its_end_and_noted(tmp_path, content):
    seconds, notes = decode(tmp_path / "a", content)
    assert seconds == 1.0
    assert list(notes) == ["repaired"]


@pytest.mark.parametrize(
    "content",
    [
        WAV,
        WAV + b"LIST\4\0\0\0abcd",
        WAV + b"\0",
        encoded(tone(1.0, RATE_HZ), "RF64"),
        encoded(tone(1.0, RATE_HZ), "W64"),
    ],
    ids=["wav", "chunk after the audio", "padding", "rf64", "w64"],
)
def test_a_right_header_is_not_noted(tmp_path, content):
    assert decode(tmp_path / "a", content) == (1.0, {})


@pytest.mark.parametrize("format", ["WAV", "RF64", "AIFF", "AU", "W64"])
def test_a_cut_copy_is_truncated(tmp_path, format):
    content = encoded(tone(1.0, RATE_HZ), format, subtype="PCM_16")
    reject = rejected(tmp_path / "a", content[:20000])
    assert reject.reason == "truncated" and "32000" in reject.detail.replace("32008", "32000")


@pytest.mark.parametrize(
    "content",
    [WAV + WAV, sized(20000), *(encoded(tone(1.0, RATE_HZ), format) * 2 for format in ("FLAC", "OGG", "AU"))],
    ids=["wav", "header not updated", "flac", "ogg", "au"],
)
def test_audio_after_the_stated_end_is_not_dropped(tmp_path, content):
    assert rejected(tmp_path / "a", content).reason == "truncated"


def test_an_empty_wav_with_a_chunk_after_its_audio_is_empty(tmp_path):
    content = encoded(np.zeros(0), subtype="PCM_16") + b"LIST\4\0\0\0abcd"
    assert rejected(tmp_path / "a", content).reason == "empty"


def test_an_mp3_without_an_index_has_all_its_frames(tmp_path):
    seconds, notes = decode(tmp_path / "a.mp3", without_index(MP3))
    assert seconds == pytest.approx(4.0, abs=2 * MP3_FRAME_S)
    assert "no index" in notes["repaired"]


@pytest.mark.parametrize("rate_hz", [16000, 44100])
def test_an_mp3_of_constant_bitrate_needs_no_index(tmp_path, rate_hz):
    buffer = io.BytesIO()
    soundfile.write(buffer, NOISE, rate_hz, format="MP3", bitrate_mode="CONSTANT")
    seconds, _ = decode(tmp_path / "a.mp3", without_index(buffer.getvalue()))
    assert seconds == pytest.approx(len(NOISE) / rate_hz, abs=0.08)


def test_joined_mp3_files_are_read_to_the_end(tmp_path):
    seconds, notes = decode(tmp_path / "a.mp3", MP3 + MP3)
    assert seconds == pytest.approx(8.0, abs=0.25)  # delay and padding of both encoders
    assert "the index counts" in notes["repaired"]


def test_tags_around_an_mp3_are_not_audio(tmp_path):
    content = b"ID3\3\0\0\0\0\7\0" + bytes(896) + MP3 + b"APETAGEX\xd0\7\0\0\0\2\0\0" + b"x" * 528 + b"TAG" + bytes(125)
    assert decode(tmp_path / "a.mp3", content) == (4.0, {})


@pytest.mark.parametrize(("rate_hz", "channels", "what"), [(24000, 1, "sample rate"), (16000, 2, "channels")])
def test_mp3_files_joined_from_unlike_ones_are_rejected(tmp_path, rate_hz, channels, what):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(1.0, rate_hz, channels=channels), rate_hz, format="MP3")
    reject = rejected(tmp_path / "a.mp3", MP3 + buffer.getvalue())
    assert reject.reason == "truncated" and what in reject.detail


def test_a_cut_mp3_is_truncated(tmp_path):
    assert rejected(tmp_path / "a.mp3", MP3[: len(MP3) // 2]).reason == "truncated"


def test_channels_that_cancel_are_rejected(tmp_path):
    audio = tone(1.0, RATE_HZ)[:, 0]
    reject = rejected(tmp_path / "a.wav", encoded(np.stack([audio, -0.9 * audio], 1)))
    assert reject.reason == "channels_cancel" and "pan=mono" in reject.detail
    decode(tmp_path / "b.wav", encoded(np.stack([audio, 0 * audio], 1)))
    independent = np.random.default_rng(1).normal(0, 0.1, (RATE_HZ, 8))
    decode(tmp_path / "c.wav", encoded(independent))


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_is_noted(tmp_path, level):
    assert list(decode(tmp_path / "a.wav", encoded(np.full(RATE_HZ, level)))[1]) == ["silent"]


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_rejected_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    assert "named pipe" in rejected(tmp_path / "a.wav").detail
    with pytest.raises(Reject, match="device"):
        AudioFile("/dev/zero", None)


@pytest.mark.parametrize(("content", "name"), [(b"\0\0\0\x1cftypM4A \0\0\0\0", "MPEG-4"), (b"\xff\xf1\x50\x80", "AAC")])
def test_a_format_without_a_decoder_is_named_with_a_remedy(tmp_path, content, name):
    reject = rejected(tmp_path / "a.wav", content + bytes(300))
    assert reject.reason == "undecodable" and name in reject.detail and "ffmpeg" in reject.detail
