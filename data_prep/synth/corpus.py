"""Plans a synthetic corpus and renders its audio."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synth.folder import finish, read_finished, start, write, write_lines
from data_prep.synth.music import plan_music
from data_prep.synth.plan import Plan, deck
from data_prep.synth.questions import word_questions
from data_prep.synth.signals import Samples, noise, num_samples
from data_prep.synth.sounds import plan_sounds
from data_prep.synth.speech import plan_speech
from pipeline.core.errors import UserError

REVISION = 1  # raise it with every change that alters the corpus
DOMAINS: dict[str, Callable[[np.random.Generator], Iterator[Plan]]] = {
    "sound": plan_sounds,
    "music": plan_music,
    "speech": plan_speech,
}
HELD_OUT = (True,) * 3 + (False,) * 17  # 15 % of each domain
SMALLEST_CORPUS = 30  # below it a domain has hardly a held-out clip

# Low rates are more frequent than high ones, so that a thousand clips stay near 200 MB.
RATES_HZ = (16000, 16000, 16000, 16000, 22050, 22050, 32000, 32000, 44100, 48000)
ENCODINGS = (
    ("WAV", "PCM_16"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
)
CHANNELS = (1, 1, 1, 2)
GAIN_DB = (-3.0, 3.0)
NOISE_DB = (-70.0, -64.0)  # before the gain; foreground sounds lie near -30
PEAK = 0.98


@dataclass(frozen=True)
class Clip:
    """A planned file; its rendering depends on its own `seed`, so that clips can be rendered in any order."""

    clip_id: str
    domain: str
    held_out: bool
    seed: tuple[int, ...]
    rate_hz: int
    container: str
    subtype: str
    channels: int
    gain_db: float
    noise_db: float
    plan: Plan
    questions: list[dict[str, str]]

    @property
    def audio(self) -> str:
        """Returns the path relative to the corpus folder."""
        return f"audio/{self.clip_id}.{self.container.lower()}"


def check_size(clips: int, seed: int) -> None:
    """Checks the size and the seed of a corpus.

    Raises:
        UserError: there are too few clips, or the seed is negative.
    """
    if clips < SMALLEST_CORPUS:
        raise UserError("--clips", f"{clips} is too few", f"request at least {SMALLEST_CORPUS}")
    if seed < 0:
        raise UserError("--seed", f"{seed} is negative", "give 0 or more")


def plan_corpus(clips: int, seed: int) -> list[Clip]:
    """Plans a corpus without rendering it; clips alternate between the domains.

    Raises:
        UserError: see `check_size`.
    """
    check_size(clips, seed)
    rng = np.random.default_rng([seed, 0])
    plans = {name: make_plans(rng) for name, make_plans in DOMAINS.items()}
    held_out = {name: deck(rng, HELD_OUT) for name in DOMAINS}
    rates, encodings, channels = deck(rng, RATES_HZ), deck(rng, ENCODINGS), deck(rng, CHANNELS)
    corpus = []
    for index in range(clips):
        domain = list(DOMAINS)[index % len(DOMAINS)]
        clip_id = f"{domain}-{index:06d}"
        plan = next(plans[domain])
        container, subtype = next(encodings)
        corpus.append(
            Clip(
                clip_id=clip_id,
                domain=domain,
                held_out=next(held_out[domain]),
                seed=(seed, 1, index),
                rate_hz=next(rates),
                container=container,
                subtype=subtype,
                channels=next(channels),
                gain_db=float(rng.uniform(*GAIN_DB)),
                noise_db=float(rng.uniform(*NOISE_DB)),
                plan=plan,
                questions=word_questions(clip_id, plan.facts(), rng),
            )
        )
    return corpus


def render(clip: Clip) -> Samples:
    """Returns the samples of a clip, (samples, channels), with background noise and gain."""
    rng = np.random.default_rng(clip.seed)
    samples = num_samples(clip.plan.duration_s, clip.rate_hz)
    dry = clip.plan.render(clip.rate_hz, rng)
    width_hz = clip.rate_hz / 16000  # the same noise level per Hz at every rate
    background = 10 ** (clip.noise_db / 20) * np.sqrt(width_hz)
    pans = 10 ** (rng.uniform(-3, 0, clip.channels) / 20)
    wet = np.stack([dry * pan + background * noise(rng, samples) for pan in pans], axis=1)
    wet *= 10 ** (clip.gain_db / 20)
    return (wet * min(1.0, PEAK / float(np.abs(wet).max()))).astype(np.float32)


def encode(clip: Clip) -> bytes:
    """Returns the bytes of the audio file; they depend on the clip alone."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, render(clip), clip.rate_hz, format=clip.container, subtype=clip.subtype)
    data = bytearray(buffer.getvalue())
    if clip.subtype == "FLOAT":
        stamp = data.index(b"PEAK") + 12  # after id, size and version: the time of writing
        data[stamp : stamp + 4] = bytes(4)
    return bytes(data)


def write_corpus(out: Path, clips: int, seed: int) -> dict[str, Any]:
    """Writes the corpus, unless it is already finished.

    The folder appears under its name when it is complete. An interrupted run leaves `.NAME.unfinished` beside it, from
    which the next run with the same settings resumes.

    Returns:
        the content of `synth.json`.

    Raises:
        UserError: `out` holds something else, or a setting is invalid.
    """
    out = out.resolve()
    settings = {"revision": REVISION, "clips": clips, "seed": seed}
    finished = read_finished(out, settings)
    if finished is not None:
        return finished
    corpus = plan_corpus(clips, seed)
    work_dir = start(out, settings)
    (work_dir / "audio").mkdir(exist_ok=True)
    for clip in corpus:
        path = work_dir / clip.audio
        if not path.exists():
            write(path, encode(clip))
    for name, held_out in (("train.jsonl", False), ("test.jsonl", True)):
        write_lines(work_dir / name, [_manifest_row(clip) for clip in corpus if clip.held_out == held_out])
    write_lines(work_dir / "truth.jsonl", [{"clip_id": clip.clip_id, **asdict(clip.plan)} for clip in corpus])
    record = {**settings, **summary(corpus)}
    finish(work_dir, out, record)
    return record


def summary(corpus: list[Clip]) -> dict[str, Any]:
    """Returns the counts of a planned corpus."""
    return {
        "questions": sum(len(clip.questions) for clip in corpus),
        "audio_hours": round(sum(clip.plan.duration_s for clip in corpus) / 3600, 4),
        "train_clips": sum(not clip.held_out for clip in corpus),
        "test_clips": sum(clip.held_out for clip in corpus),
    }


def _manifest_row(clip: Clip) -> dict[str, Any]:
    return {
        "clip_id": clip.clip_id,
        "audio": clip.audio,
        "dataset": "synth",
        "domain": clip.domain,
        "questions": clip.questions,
    }
