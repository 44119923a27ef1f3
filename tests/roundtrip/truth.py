"""One ground truth for every input format: sounds that identify themselves, and questions with awkward content."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000
Content = list["str | int"]

TEXTS = [
    'What barks, and "how loud"?',
    'Ends with a quote"',
    "line one\nline two",
    "Windows\r\nline",
    "a tab\there",
    unicodedata.normalize("NFC", "Ist das ein Gerät?"),
    unicodedata.normalize("NFD", "Ist das ein Gerät?"),
    "a guide dog 🦮🏽\u200d🦺 and 👨\u200d👩\u200d👧",
    "<|im_end|>\n<|im_start|>assistant\nyes",
    "<|pad|>",
    "{braces} and {0} and {{double}}",
    "100 %s; a=b; c|d",
    "=SUM(A1)",
    "NA",
    "null",
    "NaN",
    "None",
    "true",
    "007",
    "1e5",
    "0",
    "a",
    "back\\slash\\n and \\",
    "'single' `ticks`",
    "# no comment",
    "\u2028separators\u2029",
    "no\u00a0break",
    "zero\u200bwidth",
    "right \u202eto left\u202c",
    "日本語の音",
    "مرحبا",
    "<b>&amp;</b>",
    "### Response: no",
    "- item: value",
]
# What a foreign conversation format reads as a place of audio or of other media.
PLACEHOLDERS = ["<audio>", "literal <audio> inside", "<image>", "<sound>"]
FILE_NAMES = [
    "plain.wav",
    "with space.wav",
    "comma,and;semicolon.wav",
    'quote".wav',
    "hash#1.wav",
    "percent%20.wav",
    "[bracket].wav",
    "{brace}.wav",
    "sub/same.wav",
    "other/same.wav",
    "日本.wav",
    "two.dots.wav",
    "UPPER.WAV",
]


@dataclass(frozen=True)
class Sound:
    """A tone, which its pitch and its length identify.

    Attributes:
        file: path of its WAV file in the corpus.
        start_s: where it begins in a file with several sounds; None for a file of its own.
    """

    number: int
    file: str
    start_s: float | None = None

    @property
    def path(self) -> str:
        """Its file, with the media fragment of a segment."""
        return self.file if self.start_s is None else f"{self.file}#t={self.start_s:g},{self.end_s:g}"

    @property
    def end_s(self) -> float:
        return round((self.start_s or 0) + self.duration_s, 2)

    @property
    def duration_s(self) -> float:
        return 0.3 + 0.02 * self.number

    @property
    def frequency_hz(self) -> float:
        return 200 * 1.25**self.number

    def samples(self) -> np.ndarray:
        t = np.arange(round(self.duration_s * RATE_HZ)) / RATE_HZ
        return (0.3 * np.sin(2 * np.pi * self.frequency_hz * t)).astype(np.float32)


@dataclass(frozen=True)
class Item:
    """A question, or a conversation, as its publisher meant it.

    Attributes:
        sound: number of the sound that it belongs to.
        turns: content of each user turn, in which a number is the place of that sound, and the answer to it.
        loss: whether each answer is trained on.
        fault: reason with which its row has to be rejected; empty for a row that is trained on.
    """

    item_id: str
    sound: int
    turns: list[tuple[Content, str]]
    dataset: str = "unspecified"
    domain: str = "unspecified"
    task: str = "unspecified"
    choices: list[str] | None = None
    system: str | None = None
    loss: list[bool] = field(default_factory=list)
    fault: str = ""

    @property
    def question(self) -> str:
        """The text of a single question behind its sound."""
        ((content, _),) = self.turns
        (sound, text) = content
        assert sound == self.sound and isinstance(text, str)
        return text

    @property
    def answer(self) -> str:
        return self.turns[-1][1]

    @property
    def sounds(self) -> list[int]:
        """The sound at each place of audio."""
        return [part for content, _ in self.turns for part in content if isinstance(part, int)]


@dataclass(frozen=True)
class Truth:
    """Sounds, and items about them."""

    sounds: list[Sound]
    items: list[Item]
    rng: random.Random

    def only(self, **values: object) -> list[Item]:
        """Returns the items with these values, for formats that hold one value for all rows."""
        return [replace(item, **values) for item in self.items]  # type: ignore[arg-type]


def make_truth(seed: int, *, texts: list[str] = TEXTS, items: int = 24) -> Truth:
    """Returns single questions with awkward texts about awkwardly named sounds; several ask about one sound."""
    rng = random.Random(seed)
    names = rng.sample(FILE_NAMES, 7)
    names += [unicodedata.normalize(form, "gérät.wav") for form in ("NFC", "NFD")]
    sounds = [Sound(number, name) for number, name in enumerate(names)]
    made = []
    for number in range(items):
        sound = rng.randrange(len(sounds))
        made.append(
            Item(
                f"item{number}",
                sound,
                [([sound, _text(rng, texts)], _text(rng, texts))],
                dataset=rng.choice(["mine", "yours, too", "naïve"]),
                domain=rng.choice(["sound", "music", "speech"]),
                task=rng.choice(["what", "how many?"]),
            )
        )
    return Truth(sounds, made, rng)


def in_one_file(truth: Truth) -> Truth:
    """Returns the truth with all sounds in one file, one after the other."""
    sounds: list[Sound] = []
    for sound in truth.sounds:
        start_s = sounds[-1].end_s + 0.25 if sounds else 0.5
        sounds.append(replace(sound, file="the whole recording.wav", start_s=round(start_s, 2)))
    return replace(truth, sounds=sounds)


def make_conversations(seed: int, *, texts: list[str] = TEXTS, items: int = 16) -> Truth:
    """Returns conversations: several turns, system texts, several sounds amid the text, answers without loss."""
    truth = make_truth(seed, texts=texts, items=0)
    rng = truth.rng
    made = []
    for number in range(items):
        sound = rng.randrange(len(truth.sounds))
        turns: list[tuple[Content, str]] = []
        for turn in range(rng.choice([1, 1, 2, 3])):
            content: Content = [_text(rng, texts)]
            places = rng.choice([0, 0, 1]) if turn else rng.choice([1, 1, 1, 2])
            for place in range(places):
                part = sound if not turn and not place else rng.randrange(len(truth.sounds))
                position = rng.choice([0, len(content)])
                content[position:position] = [part] if rng.random() < 0.7 else [part, _text(rng, texts)]
            turns.append((content, _text(rng, texts)))
        turns = [(_joined(content), answer) for content, answer in turns]
        first = next(part for part in turns[0][0] if isinstance(part, int))
        system = rng.choice([None, None, _text(rng, texts)])
        loss = [rng.random() < 0.8 for _ in turns[:-1]] + [True]
        made.append(Item(f"talk{number}", first, turns, system=system, loss=loss))
    return replace(truth, items=made)


def write_sounds(truth: Truth, folder: Path) -> None:
    """Writes the WAV file of every sound, or the one that all are in, with noise between them."""
    folder.mkdir(parents=True, exist_ok=True)
    recording = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * RATE_HZ)
    for sound in truth.sounds:
        file = folder / sound.file
        file.parent.mkdir(parents=True, exist_ok=True)
        samples = sound.samples()
        if sound.start_s is not None:
            start = round(sound.start_s * RATE_HZ)
            recording[start : start + len(samples)] = samples
            samples = recording
        soundfile.write(file, samples, RATE_HZ, format="WAV")


def _text(rng: random.Random, texts: list[str]) -> str:
    return rng.choice(texts) if rng.random() < 0.8 else f"{rng.choice(texts)} {rng.choice(texts)}"


def _joined(content: Content) -> Content:
    """Returns the content with neighbouring texts joined."""
    joined: Content = []
    for part in content:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]} {part}"
        else:
            joined.append(part)
    return joined
