"""Writes manifests of recorded prompts in five languages and of instruments, with held-out clips of their own.

Tasks: `transcription`, `language` (identification) and `instrument`. The prompts are 8 kHz telephone recordings, one
voice a language, and English and Spanish are one speaker, so a voice does not tell these two apart. A prompt is
held out in every language at once, and no sentence of a held-out clip is spoken in a training clip.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from pipeline.core.files import atomic_write
from tests.real.fetch import INSTRUMENTS, LANGUAGES, fetch_debian_package, prompt_packages

LANGUAGE_NAMES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
TRANSCRIBED = ("en", "es", "fr", "it")  # SmolLM2's tokenizer spends a token on almost every Cyrillic letter
SHORTEST_S, LONGEST_S = 0.5, 8.0
TRANSCRIBE = "Transcribe the speech."
IDENTIFY = "Which language is spoken: English, French, Italian, Russian or Spanish?"
NAME_INSTRUMENT = "Which instrument or sound is this: {names}?"
HELD_OUT = {"speech": 0.2, "music": 0.35}
# Name of the class and pattern of the file names; the first match counts.
INSTRUMENT_CLASSES = (
    ("snare drum", r"sn_|drum_snare|elec_(filt|hi|lo|mid)?_?snare"),
    ("bass drum", r"bd_|drum_heavy_kick|drum_bass|elec_(soft|hollow)_kick"),
    ("cymbal", r"drum_(cymbal|splash)|elec_cymbal"),
    ("tom", r"drum_tom|elec_fuzz_tom"),
    ("tabla", r"tabla_"),
    ("bell", r"perc_bell|elec_(bell|chime|triangle|ping)|drum_cowbell"),
    ("bass synthesizer", r"bass_"),
    ("guitar", r"guit_"),
    ("drum loop", r"loop_"),
    ("ambient pad", r"ambi_"),
    ("turntable", r"vinyl_"),
    ("robot voice", r"mehackit_robot|glitch_robot"),
)


@dataclass(frozen=True)
class Clip:
    """One recording with its questions.

    Attributes:
        key: what is held out together: the prompt's name, or the instrument's file.
        questions: (task, question, answer).
    """

    clip_id: str
    audio: Path
    domain: str
    key: str
    questions: tuple[tuple[str, str, str], ...]

    def row(self) -> dict[str, Any]:
        """Returns the clip as a row of a manifest."""
        questions = [{"question": q, "answer": a, "task": task} for task, q, a in self.questions]
        return {"clip_id": self.clip_id, "audio": str(self.audio), "dataset": "real", "domain": self.domain,
                "questions": questions}  # fmt: skip


def write_corpus(folder: Path, every: int = 1) -> dict[str, int]:
    """Writes `train.jsonl` and `test.jsonl` into `folder`. Returns their numbers of clips.

    Args:
        every: keeps one clip of so many, for a quick run.
    """
    clips = [*speech_clips(), *instrument_clips()]
    test = [clip for clip in clips if _fraction(clip.key) < HELD_OUT[clip.domain]]
    spoken = {answer for clip in test for answer in _spoken(clip)}
    train = [clip for clip in clips if _fraction(clip.key) >= HELD_OUT[clip.domain] and not spoken & _spoken(clip)]
    sizes = {}
    for name, part in (("train", train), ("test", test)):
        part = sorted(part, key=lambda clip: _fraction(clip.clip_id))[::every]
        text = "".join(json.dumps(clip.row(), ensure_ascii=False) + "\n" for clip in part)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / f"{name}.jsonl", text.encode())
        sizes[name] = len(part)
    return sizes


def speech_clips() -> Iterator[Clip]:
    """Yields the recorded prompts whose text is plain speech."""
    for language in LANGUAGES:
        sounds, texts = (fetch_debian_package(name) for name in prompt_packages(language))
        (voice,) = (sounds / "usr/share/asterisk/sounds").iterdir()
        (listing,) = (texts / "usr/share/doc" / prompt_packages(language)[1]).glob("core-sounds-*.txt.gz")
        for key, text in read_texts(listing).items():
            audio = voice / f"{key}.wav"
            if not audio.exists() or not SHORTEST_S <= soundfile.info(audio).duration <= LONGEST_S:
                continue
            questions = [("language", IDENTIFY, LANGUAGE_NAMES[language])]
            if language in TRANSCRIBED:
                questions.append(("transcription", TRANSCRIBE, text))
            yield Clip(f"{language}/{key}", audio, "speech", key, tuple(questions))


def read_texts(listing: Path) -> dict[str, str]:
    """Returns the texts of `key: text` lines, without comments, notes on the recording and texts with lost letters."""
    texts = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8-sig").splitlines():
        key, separator, text = line.partition(":")
        text = " ".join(text.replace("...", " ").split())
        is_speech = re.search(r"\w", text) and not re.search(r"[\[\]()<>@/_*#]|\?.", text)
        if separator and not line.startswith(";") and is_speech:
            texts[key.strip()] = text
    return texts


def instrument_clips() -> Iterator[Clip]:
    """Yields the samples whose file name states a class."""
    folder = fetch_debian_package(INSTRUMENTS) / "usr/share/sonic-pi/samples"
    question = NAME_INSTRUMENT.format(names=", ".join(sorted(name for name, _ in INSTRUMENT_CLASSES)))
    for audio in sorted(folder.glob("*.flac")):
        names = [name for name, pattern in INSTRUMENT_CLASSES if re.match(pattern, audio.stem)]
        if names and soundfile.info(audio).duration <= 4 * LONGEST_S:
            yield Clip(audio.stem, audio, "music", audio.stem, (("instrument", question, names[0]),))


def _spoken(clip: Clip) -> set[str]:
    """Returns the sentence of a clip, without case and punctuation."""
    return {
        re.sub(r"\W+", " ", answer).strip().lower() for task, _, answer in clip.questions if task == "transcription"
    }


def _fraction(key: str) -> float:
    """Returns a number from 0 to 1 that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
