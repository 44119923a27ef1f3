"""Renders the domain `speech`: invented words of one to three consonant-vowel syllables, by formant synthesis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.synth.plan import Fact, Plan, deck
from data_prep.synth.signals import (
    HIGHEST_HZ,
    Samples,
    at_level,
    bins_hz,
    faded,
    filtered,
    glide,
    mix_in,
    noise,
    num_samples,
    shaped,
    tone,
)

# Difficulty
CONSONANTS = ("m", "s", "t")
VOWELS_HZ = {"a": (800, 1250, 2600), "i": (280, 2300, 3000), "u": (310, 800, 2300)}  # formants of a male voice
SYLLABLES = (1, 2, 3)
SPEAKERS = {"man": (115.0, 1.0), "woman": (190.0, 1.1), "child": (310.0, 1.2)}  # pitch in Hz, formant scale
PITCH_FALL = 0.9  # pitch falls to this share over the word, as in a statement
CONSONANT_S = {"m": 0.12, "s": 0.14, "t": 0.09}
VOWEL_S = (0.20, 0.24)
LONG_VOWEL_S = (0.55, 0.65)
GAP_S = (0.09, 0.12)
LEVEL_DB = -26.0
BANDWIDTH_HZ = (90.0, 110.0, 170.0)


@dataclass(frozen=True)
class Syllable:
    """A consonant and a vowel; the pitch glides over the vowel."""

    consonant: str
    vowel: str
    start_s: float
    vowel_s: float
    level_db: float
    pitch_hz: tuple[float, float]

    @property
    def text(self) -> str:
        """The syllable in letters."""
        return self.consonant + self.vowel

    @property
    def duration_s(self) -> float:
        """Duration of consonant and vowel."""
        return CONSONANT_S[self.consonant] + self.vowel_s


@dataclass(frozen=True)
class SpeechPlan(Plan):
    """A clip of one word by one speaker."""

    speaker: str
    syllables: tuple[Syllable, ...]

    def facts(self) -> list[Fact]:
        words = [syllable.text for syllable in self.syllables]
        return [
            Fact("speech.transcribe", " ".join(words)),
            Fact("speech.count", ("one", "two", "three")[len(words) - 1]),
            Fact("speech.speaker", self.speaker),
            Fact("speech.longest", max(self.syllables, key=lambda syllable: syllable.vowel_s).vowel),
            Fact("speech.first", words[0]),
            Fact("speech.last", words[-1]),
        ]

    def render(self, rate_hz: int, rng: np.random.Generator) -> Samples:
        clip = np.zeros(num_samples(self.duration_s, rate_hz), dtype=np.float32)
        scale = SPEAKERS[self.speaker][1]
        for syllable in self.syllables:
            wave = _speak(syllable, scale, rate_hz, rng)
            mix_in(clip, at_level(wave, rate_hz, syllable.level_db), syllable.start_s, rate_hz)
        return clip


def plan_speech(rng: np.random.Generator) -> Iterator[SpeechPlan]:
    """Yields endless plans; syllables, speakers and positions of the long vowel are balanced."""
    counts, speakers = deck(rng, SYLLABLES), deck(rng, tuple(SPEAKERS))
    inventory = deck(rng, [(consonant, vowel) for consonant in CONSONANTS for vowel in VOWELS_HZ])
    while True:
        count, speaker = next(counts), next(speakers)
        stretched = int(rng.integers(count))
        texts = [next(inventory) for _ in range(count)]
        vowels_s = [rng.uniform(*(LONG_VOWEL_S if index == stretched else VOWEL_S)) for index in range(count)]
        lengths_s = [CONSONANT_S[text[0]] + vowel_s for text, vowel_s in zip(texts, vowels_s, strict=True)]
        starts_s = rng.uniform(0.1, 0.25) + np.cumsum([0.0, *(s + rng.uniform(*GAP_S) for s in lengths_s)])
        middle_hz = SPEAKERS[speaker][0] * rng.uniform(0.95, 1.05)
        pitches_hz = middle_hz * np.interp(starts_s, starts_s[[0, -1]], [1, PITCH_FALL])

        syllables = tuple(
            Syllable(
                *texts[index],
                start_s=float(starts_s[index]),
                vowel_s=vowels_s[index],
                level_db=LEVEL_DB + rng.uniform(-2, 2),
                pitch_hz=(float(pitches_hz[index]), float(pitches_hz[index + 1])),
            )
            for index in range(count)
        )
        yield SpeechPlan(min(4.0, max(2.0, float(starts_s[-1]) + rng.uniform(0.1, 0.3))), speaker, syllables)


def _speak(syllable: Syllable, scale: float, rate_hz: int, rng: np.random.Generator) -> Samples:
    """Renders one syllable; `scale` multiplies the formants (a shorter vocal tract has higher ones)."""
    consonant = num_samples(CONSONANT_S[syllable.consonant], rate_hz)
    vowel = num_samples(syllable.vowel_s, rate_hz)
    source = tone(glide(*syllable.pitch_hz, vowel), [1.0] * 60, vowel, rate_hz)
    voiced = filtered(source, _formant_gain(bins_hz(vowel, rate_hz), VOWELS_HZ[syllable.vowel], scale))
    voiced = at_level(faded(voiced, rate_hz, 0.015, 0.03), rate_hz, 0.0)
    if syllable.consonant == "m":
        hum = tone(syllable.pitch_hz[0], [1.0] * 8, consonant, rate_hz)
        lead = shaped(hum, rate_hz, {0: 1, 350: 1, 600: 0.03, 3000: 0})
        level_db = -5.0
    elif syllable.consonant == "s":
        lead = shaped(noise(rng, consonant), rate_hz, {3500: 0, 4500: 1, 7000: 1, HIGHEST_HZ: 0})
        level_db = -6.0
    else:  # t: silence, then a short burst
        burst = shaped(noise(rng, consonant), rate_hz, {1500: 0, 2500: 1, 6500: 1, HIGHEST_HZ: 0})
        burst[: consonant * 2 // 3] = 0
        lead = burst
        level_db = -2.0
    return np.concatenate([at_level(faded(lead, rate_hz, 0.005, 0.01), rate_hz, level_db), voiced])


def _formant_gain(
    frequency_hz: npt.NDArray[np.float64], formants_hz: tuple[int, int, int], scale: float
) -> npt.NDArray[np.float64]:
    """Returns the magnitude response of three resonances in series, with the spectral tilt of a voice."""
    gain = 1 / (1 + frequency_hz / 1500)
    for formant_hz, bandwidth_hz in zip(formants_hz, BANDWIDTH_HZ, strict=True):
        centre_hz = formant_hz * scale
        gain = gain * centre_hz**2 / np.hypot(centre_hz**2 - frequency_hz**2, bandwidth_hz * frequency_hz)
    return gain
