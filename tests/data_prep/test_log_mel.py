import numpy as np
import pytest
import torch
from torchaudio.transforms import MelSpectrogram

from data_prep.audio.windows import Windower
from data_prep.config import LogMelConfig
from data_prep.encoders.build import build_encoder, describe_encoder


def encode_clip(encoder, audio: np.ndarray, segment: int = 10**9) -> np.ndarray:
    """Returns the features of one clip whose audio arrives in segments of this many samples."""
    windower = Windower(encoder)
    starts = range(0, len(audio), segment)
    windows = [window for a in starts for window in windower.push(audio[a : a + segment], a + segment >= len(audio))]
    return np.concatenate(encode(encoder, windows))


def encode(encoder, windows) -> list[np.ndarray]:
    return encoder.encode_windows([encoder.prepare(window) for window in windows], [w.samples for w in windows])


def reference(config: LogMelConfig, audio: np.ndarray) -> np.ndarray:
    """Returns torchaudio's features of the whole clip, padded with silence to whole stored frames."""
    hop = round(config.hop_ms * config.sample_rate_hz / 1000)
    n_fft = round(config.window_ms * config.sample_rate_hz / 1000)
    tokens = -(-len(audio) // (hop * config.frames_per_token))
    audio = np.pad(audio, (0, tokens * hop * config.frames_per_token - len(audio)))
    mel = MelSpectrogram(config.sample_rate_hz, n_fft, hop_length=hop, n_mels=config.num_mels, pad_mode="constant")
    log_mel = ((mel(torch.from_numpy(audio)) + 1e-6).log() - config.mean) / config.std
    return log_mel.T[: tokens * config.frames_per_token].reshape(tokens, -1).numpy()


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(LogMelConfig(), describe_encoder(LogMelConfig()), "cpu")


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize("samples", [400, 1600, 16000, 160001, 30 * 16000, 30 * 16000 + 100, 61 * 16000 + 7])
def test_equals_torchaudio_at_any_length_and_segmentation(encoder, samples):
    audio = noise(samples)
    expected = reference(LogMelConfig(), audio)
    for segment in (10**9, 7001):
        features = encode_clip(encoder, audio, segment)
        assert features.dtype == np.float16 and features.shape == expected.shape
        np.testing.assert_allclose(features, expected, atol=2e-3)  # half a unit in float16's last place at 4


def test_settings_reach_the_features():
    config = LogMelConfig(num_mels=40, frames_per_token=2, hop_ms=20, window_ms=40, mean=1.0, std=2.0)
    contract = describe_encoder(config)
    features = encode_clip(build_encoder(config, contract, "cpu"), noise(8000))
    assert (contract.frame_rate_hz, contract.width) == (25.0, 80) and features.shape == (13, 80)
    np.testing.assert_allclose(features, reference(config, noise(8000)), atol=5e-3)


def test_features_do_not_depend_on_the_batch(encoder):
    clips = [noise(n) for n in (1600, 48000, 16001)]
    windows = [window for audio in clips for window in Windower(encoder).push(audio, True)]
    for together, audio in zip(encode(encoder, windows), clips, strict=True):
        np.testing.assert_array_equal(together, encode_clip(encoder, audio))


def test_different_settings_have_different_fingerprints():
    prints = {describe_encoder(LogMelConfig(num_mels=n, mean=m)).fingerprint for n in (40, 64) for m in (-7.5, -7)}
    assert len(prints) == 4
