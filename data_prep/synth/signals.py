"""Building blocks of the synthetic audio: tones, noise, envelopes, filters, mixing. Vectorised numpy, no files.

Times are in seconds, rates in Hz, levels in dB relative to full scale. Nothing is written above `HIGHEST_HZ`, so that
clips sound alike at all sample rates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

HIGHEST_HZ = 7500.0  # below the Nyquist frequency of the lowest sample rate, 16 kHz
TABLE_SIZE = 4096
LOUDNESS_WINDOW_S = 0.05


def num_samples(duration_s: float, rate_hz: int) -> int:
    """Returns the number of samples of a duration."""
    return round(duration_s * rate_hz)


def tone(frequency_hz: npt.ArrayLike, harmonics: Sequence[float], samples: int, rate_hz: int) -> Samples:
    """Returns a periodic tone.

    Args:
        frequency_hz: frequency of the fundamental; one number, or one per sample (a glide).
        harmonics: amplitudes of harmonics 1, 2, ...; those above `HIGHEST_HZ` are omitted.
    """
    track = np.broadcast_to(np.asarray(frequency_hz, dtype=np.float64), samples)
    audible = max(1, int(HIGHEST_HZ / track.max()))
    phase = np.cumsum(track) * (TABLE_SIZE / rate_hz)
    return _wave_table(tuple(harmonics[:audible]))[phase.astype(np.int64) % TABLE_SIZE]


@functools.lru_cache(maxsize=256)
def _wave_table(harmonics: tuple[float, ...]) -> Samples:
    angle = np.arange(TABLE_SIZE) * (2 * np.pi / TABLE_SIZE)
    amplitudes = np.asarray(harmonics)
    orders = np.arange(1, len(harmonics) + 1)
    # Schroeder phases keep the crest factor low: a sum of sines in phase would be a train of spikes.
    phases = np.pi * orders**2 / max(len(harmonics), 1)
    return (amplitudes[:, None] * np.sin(orders[:, None] * angle + phases[:, None])).sum(0).astype(np.float32)


def noise(rng: np.random.Generator, samples: int) -> Samples:
    """Returns white noise of unit variance."""
    return rng.standard_normal(samples, dtype=np.float32)


def shaped(wave: Samples, rate_hz: int, gain_of_hz: dict[float, float]) -> Samples:
    """Returns the wave filtered (zero phase) by a response interpolated between (frequency, gain) points."""
    return filtered(wave, np.interp(bins_hz(len(wave), rate_hz), list(gain_of_hz), list(gain_of_hz.values())))


def filtered(wave: Samples, gain: npt.NDArray[np.float64]) -> Samples:
    """Returns the wave with each bin of its spectrum multiplied by `gain` (one per entry of `bins_hz`)."""
    return np.fft.irfft(np.fft.rfft(wave) * gain, len(wave)).astype(np.float32)


def bins_hz(samples: int, rate_hz: int) -> npt.NDArray[np.float64]:
    """Returns the frequency of each bin of a real spectrum."""
    return np.fft.rfftfreq(samples, 1 / rate_hz)


def glide(start_hz: float, end_hz: float, samples: int) -> npt.NDArray[np.float64]:
    """Returns frequencies that move linearly in pitch."""
    return np.geomspace(start_hz, end_hz, samples)


def decay(samples: int, rate_hz: int, time_constant_s: float) -> Samples:
    """Returns an exponential decay from 1."""
    return np.exp(-np.arange(samples, dtype=np.float32) / np.float32(time_constant_s * rate_hz))


def faded(wave: Samples, rate_hz: int, attack_s: float = 0.01, release_s: float = 0.02) -> Samples:
    """Returns the wave with smooth edges, without clicks at onset and offset."""
    wave = wave.copy()
    rise = min(num_samples(attack_s, rate_hz), len(wave) // 2)
    fall = min(num_samples(release_s, rate_hz), len(wave) // 2)
    wave[:rise] *= _half_cosine(rise)
    wave[len(wave) - fall :] *= _half_cosine(fall)[::-1]
    return wave


def _half_cosine(samples: int) -> Samples:
    return (0.5 - 0.5 * np.cos(np.pi * (np.arange(samples) + 0.5) / max(samples, 1))).astype(np.float32)


def at_level(wave: Samples, rate_hz: int, level_db: float) -> Samples:
    """Returns the wave scaled so that the root mean square of its loudest 50 ms is `level_db`."""
    window = max(1, min(len(wave), num_samples(LOUDNESS_WINDOW_S, rate_hz)))
    energy = np.concatenate(([0.0], np.cumsum(np.square(wave, dtype=np.float64))))
    loudest = (energy[window:] - energy[:-window]).max() / window
    return wave * np.float32(10 ** (level_db / 20) / np.sqrt(max(loudest, 1e-12)))


def mix_in(clip: Samples, wave: Samples, start_s: float, rate_hz: int) -> None:
    """Adds `wave` to `clip` in place, truncated at the end of the clip."""
    start = num_samples(start_s, rate_hz)
    part = wave[: len(clip) - start]
    clip[start : start + len(part)] += part
