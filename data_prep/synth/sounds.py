"""Renders the domain `sound`: one to three different sound events in sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.synth.plan import Fact, Plan, deck
from data_prep.synth.signals import (
    HIGHEST_HZ,
    Samples,
    at_level,
    decay,
    faded,
    glide,
    mix_in,
    noise,
    num_samples,
    shaped,
    tone,
)

# Difficulty
KINDS = ("beep", "hiss", "clicks", "siren", "knocking", "bell", "whistle")
DIRECTIONS = ("rising", "falling", "steady")
EVENTS = (1, 2, 3)
WHISTLE_SHARE = 0.2  # share of events that are whistles, the only ones with a direction
EVENT_S = (0.30, 0.38)
LONG_EVENT_S = (0.9, 1.0)
GAP_S = (0.22, 0.32)
LEVEL_DB = -34.0
LOUD_DB = 18.0
WHISTLE_OCTAVES = 1.8


@dataclass(frozen=True)
class Event:
    """One sound event; `pitch` from 0 to 1 is relative to the range of its kind."""

    kind: str
    start_s: float
    duration_s: float
    level_db: float
    pitch: float
    direction: str | None = None


@dataclass(frozen=True)
class SoundPlan(Plan):
    """A clip of sound events in sequence."""

    events: tuple[Event, ...]

    def facts(self) -> list[Fact]:
        kinds = [event.kind for event in self.events]
        facts = [
            Fact("sound.count", ("one", "two", "three")[len(kinds) - 1]),
            Fact("sound.first", kinds[0]),
            Fact("sound.last", kinds[-1]),
            *(Fact("sound.direction", event.direction) for event in self.events if event.direction),
        ]
        if len(kinds) == 1:
            return [*facts, Fact("sound.what", kinds[0])]
        loudest = max(self.events, key=lambda event: event.level_db)
        longest = max(self.events, key=lambda event: event.duration_s)
        return [*facts, Fact("sound.loudest", loudest.kind), Fact("sound.longest", longest.kind)]

    def render(self, rate_hz: int, rng: np.random.Generator) -> Samples:
        clip = np.zeros(num_samples(self.duration_s, rate_hz), dtype=np.float32)
        for event in self.events:
            wave = SOURCES[event.kind](event, num_samples(event.duration_s, rate_hz), rate_hz, rng)
            mix_in(clip, at_level(faded(wave, rate_hz), rate_hz, event.level_db), event.start_s, rate_hz)
        return clip


def plan_sounds(rng: np.random.Generator) -> Iterator[SoundPlan]:
    """Yields endless plans; counts, kinds, directions and positions of the loudest and longest event are balanced."""
    counts, directions = deck(rng, EVENTS), deck(rng, DIRECTIONS)
    other_kinds = [kind for kind in KINDS if kind != "whistle"]
    while True:
        count = next(counts)
        with_whistle = rng.random() < WHISTLE_SHARE * count
        kinds = list(rng.permutation(other_kinds)[: count - with_whistle]) + ["whistle"] * with_whistle
        rng.shuffle(kinds)
        loudest, longest = rng.integers(count, size=2)
        start_s, events = rng.uniform(0.1, 0.25), []
        for index, kind in enumerate(kinds):
            duration_s = rng.uniform(*(LONG_EVENT_S if index == longest and count > 1 else EVENT_S))
            level_db = LEVEL_DB + LOUD_DB * (index == loudest and count > 1) + rng.uniform(-1, 1)
            direction = next(directions) if kind == "whistle" else None
            events.append(Event(str(kind), start_s, duration_s, level_db, rng.random(), direction))
            start_s += duration_s + rng.uniform(*GAP_S)
        yield SoundPlan(max(2.0, start_s + rng.uniform(0, 0.3)), tuple(events))


Source = Callable[[Event, int, int, np.random.Generator], Samples]


def _beep(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    return tone(450 * 1.5**event.pitch, [1, 0, 0.33, 0, 0.2, 0, 0.14], samples, rate_hz)  # square: odd harmonics


def _hiss(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    return shaped(noise(rng, samples), rate_hz, {1500: 0, 2500 + 1000 * event.pitch: 1, 6500: 1, HIGHEST_HZ: 0})


def _clicks(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    wave = np.zeros(samples, dtype=np.float32)
    click = noise(rng, num_samples(0.02, rate_hz)) * decay(num_samples(0.02, rate_hz), rate_hz, 0.004)
    click = shaped(click, rate_hz, {0: 1, HIGHEST_HZ - 500: 1, HIGHEST_HZ: 0})
    for start_s in np.arange(0, samples / rate_hz - 0.02, 0.07 + 0.02 * event.pitch):
        mix_in(wave, click, start_s, rate_hz)
    return wave


def _siren(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    time_s = np.arange(samples) / rate_hz
    track_hz = (900 + 200 * event.pitch) * 1.5 ** np.sin(2 * np.pi * (5 + event.pitch) * time_s + rng.uniform(0, 6))
    return tone(track_hz, [1, 0.5, 0.3], samples, rate_hz)


def _knocking(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    wave = np.zeros(samples, dtype=np.float32)
    length = num_samples(0.1, rate_hz)
    thump = tone(110 + 50 * event.pitch, [1, 0.4, 0.2], length, rate_hz) * decay(length, rate_hz, 0.025)
    thump = faded(thump, rate_hz, attack_s=0.002)
    for start_s in np.arange(0, samples / rate_hz - 0.1, 0.125):
        mix_in(wave, thump, start_s, rate_hz)
    return wave


def _bell(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    partials = [(1.0, 1.0), (2.76, 0.8), (5.4, 0.5)]  # partials of a free bar, which have no common fundamental
    base_hz = 850 * 1.4**event.pitch
    waves = [gain * tone(base_hz * ratio, [1], samples, rate_hz) for ratio, gain in partials]
    return np.sum(waves, axis=0, dtype=np.float32) * decay(samples, rate_hz, 0.4 * samples / rate_hz)


def _whistle(event: Event, samples: int, rate_hz: int, rng: np.random.Generator) -> Samples:
    middle_hz = 2300 * 1.3**event.pitch
    reach = 2 ** (WHISTLE_OCTAVES / 2)
    low_hz, high_hz = middle_hz / reach, middle_hz * reach
    ends = {"rising": (low_hz, high_hz), "falling": (high_hz, low_hz), "steady": (middle_hz, middle_hz)}
    return tone(glide(*ends[event.direction or "steady"], samples), [1], samples, rate_hz)


SOURCES: dict[str, Source] = {
    "beep": _beep,
    "hiss": _hiss,
    "clicks": _clicks,
    "siren": _siren,
    "knocking": _knocking,
    "bell": _bell,
    "whistle": _whistle,
}
