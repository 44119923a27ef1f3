"""Renders the domain `music`: short melodies that differ in instrument, contour, tempo and number of notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.synth.plan import Fact, Plan, deck
from data_prep.synth.signals import Samples, at_level, decay, faded, mix_in, noise, num_samples, tone

# Difficulty
INSTRUMENTS = ("flute", "organ", "piano", "trumpet", "xylophone")
CONTOURS = ("rising", "falling", "up then down")
TEMPI = {"slow": 0.66, "medium": 0.38, "fast": 0.22}  # seconds between onsets
DUET_SHARE = 0.5  # share of clips in which another instrument takes over half-way
NOTES = (3, 4, 5)
SPAN_OCTAVES = 2.0  # from the lowest note to the highest
LOWEST_HZ = (300.0, 360.0)
LEVEL_DB = -26.0
NOTE_SHARE = 0.65  # share of the time between onsets in which a note sounds

HARMONICS: dict[str, tuple[float, ...]] = {
    "flute": (1, 0.1, 0.03),
    "organ": (1, 0.9, 0, 0.8, 0, 0, 0, 0.6),
    "piano": (1, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12),
    "trumpet": (0.5, 0.8, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    "xylophone": (1, 0, 0, 0.5, 0, 0, 0, 0, 0.2),
}
ATTACK_S = {"flute": 0.05, "organ": 0.008, "piano": 0.004, "trumpet": 0.03, "xylophone": 0.002}
DECAY_S = {"piano": 0.15, "xylophone": 0.04}


@dataclass(frozen=True)
class Note:
    """One note of a melody."""

    start_s: float
    duration_s: float
    frequency_hz: float
    level_db: float
    instrument: str


@dataclass(frozen=True)
class MusicPlan(Plan):
    """A clip of one melody."""

    contour: str
    tempo: str
    notes: tuple[Note, ...]

    def facts(self) -> list[Fact]:
        first, last = self.notes[0].instrument, self.notes[-1].instrument
        solo = [Fact("music.what", first)]
        duet = [Fact("music.first", first), Fact("music.last", last)]
        return [
            *(solo if first == last else duet),
            Fact("music.count", ("three", "four", "five")[len(self.notes) - 3]),
            Fact("music.contour", self.contour),
            Fact("music.tempo", self.tempo),
            Fact("music.highest", self._position_of_highest()),
        ]

    def _position_of_highest(self) -> str:
        highest = int(np.argmax([note.frequency_hz for note in self.notes]))
        return "first" if highest == 0 else "last" if highest == len(self.notes) - 1 else "middle"

    def render(self, rate_hz: int, rng: np.random.Generator) -> Samples:
        clip = np.zeros(num_samples(self.duration_s, rate_hz), dtype=np.float32)
        for note in self.notes:
            wave = _play(note, num_samples(note.duration_s, rate_hz), rate_hz, rng)
            mix_in(clip, at_level(wave, rate_hz, note.level_db), note.start_s, rate_hz)
        return clip


def plan_music(rng: np.random.Generator) -> Iterator[MusicPlan]:
    """Yields endless plans; every property is balanced and independent of the others."""
    contours, tempi = deck(rng, CONTOURS), deck(rng, tuple(TEMPI))
    counts, instruments = deck(rng, NOTES), deck(rng, INSTRUMENTS)
    while True:
        count, contour, tempo, instrument = next(counts), next(contours), next(tempi), next(instruments)
        beat_s = TEMPI[tempo] * rng.uniform(0.97, 1.03)
        heights = _heights(contour, count, rng)
        base_hz = rng.uniform(*LOWEST_HZ)
        follower = str(rng.choice([name for name in INSTRUMENTS if name != instrument]))
        handover = count // 2 if rng.random() < DUET_SHARE else count
        start_s = rng.uniform(0.1, 0.2)
        notes = tuple(
            Note(
                start_s=float(start_s + index * beat_s),
                duration_s=float(beat_s * NOTE_SHARE),
                frequency_hz=float(base_hz * 2 ** (heights[index] * SPAN_OCTAVES)),
                level_db=LEVEL_DB + rng.uniform(-2, 2),
                instrument=instrument if index < handover else follower,
            )
            for index in range(count)
        )
        end_s = float(start_s + count * beat_s)
        yield MusicPlan(min(4.0, max(2.0, end_s + rng.uniform(0, 0.3))), contour, tempo, notes)


def _heights(contour: str, count: int, rng: np.random.Generator) -> list[float]:
    """Returns the height of each note, from 0 (lowest) to 1 (highest)."""
    if contour == "rising":
        return list(np.linspace(0, 1, count))
    if contour == "falling":
        return list(np.linspace(1, 0, count))
    top = int(rng.integers(1, count - 1))
    return list(np.interp(range(count), [0, top, count - 1], [0, 1, 0]))


def _play(note: Note, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    wave = tone(note.frequency_hz, HARMONICS[note.instrument], samples, rate_hz)
    if note.instrument == "flute":
        wave = wave + 0.03 * noise(rng, samples)  # breath
    if note.instrument in DECAY_S:
        wave = wave * decay(samples, rate_hz, DECAY_S[note.instrument])
    return faded(wave, rate_hz, attack_s=ATTACK_S[note.instrument])
