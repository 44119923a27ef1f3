"""Every benchmark layout: what a model is asked about which sound equals what the publisher of the benchmark meant."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from data_prep.config import LogMelConfig
from data_prep.encoders.build import describe_encoder
from pipeline.data.chat_template import ChatTemplate, load_tokenizer
from pipeline.evaluation.benchmark_clips import BenchmarkClips
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.inference.encode_audio import AudioEncoders
from tests.roundtrip.training_view import AUDIO, SYSTEM, characters, loudest_sound, write_language_model
from tests.roundtrip.truth import RATE_HZ, TEXTS, Truth, make_truth

SEEDS = [pytest.param(seed, marks=[] if seed < 2 else pytest.mark.slow) for seed in range(12)]
CLASSES = ["dog", "car_horn", "laughter", "Rock, heavy"]


@dataclass(frozen=True)
class Asked:
    """A question of a benchmark.

    Attributes:
        texts: what the prompt has to hold, in this order.
    """

    sound: int
    texts: tuple[str, ...]
    answer: str


def write_multiple_choice(truth: Truth, root: Path, kind: str) -> list[Asked]:
    rows, asked = [], []
    for number, item in enumerate(truth.items):
        wrong = [f"{text} {index}" for index, text in enumerate(truth.rng.sample(TEXTS, 3))]
        choices = [*wrong, item.answer]
        truth.rng.shuffle(choices)
        row = {"id": f"q{number}", "question": item.question, "choices": choices, "answer": item.answer}
        file = write_sound(truth, item.sound, root / "audio" / f"{item.sound}.wav")
        row |= {"audio_id": file, "task": item.domain, "sub-category": item.task}
        row |= {"audio_path": file, "modality": item.domain, "category": item.domain, "task_name": item.task}
        row |= {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}
        rows.append({**row, "answer_gt": item.answer})
        asked.append(Asked(item.sound, (item.question, *choices), item.answer))
    name = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.jsonl", "mmsu": "mmsu.jsonl"}[kind]
    lines = [json.dumps(row, ensure_ascii=truth.rng.random() < 0.5) for row in rows]
    text = f"[{', '.join(lines)}]" if kind == "mmau" else "\n".join(lines)
    (root / name).write_text(text, encoding="utf-8")
    return asked


def write_clotho(truth: Truth, root: Path) -> list[Asked]:
    rows, asked = [["file_name", *(f"caption_{number}" for number in range(1, 6))]], []
    for sound in truth.sounds:
        file = write_sound(truth, sound.number, root / "evaluation" / sound.file.replace("/", "-"))
        captions = truth.rng.sample(TEXTS, 5)
        rows.append([Path(file).name, *captions])
        asked.append(Asked(sound.number, ("Clotho",), captions[0]))
    write_csv(root / "clotho_captions_evaluation.csv", rows)
    return asked


def write_audiocaps(truth: Truth, root: Path) -> list[Asked]:
    rows, asked = [["audiocap_id", "youtube_id", "start_time", "caption"]], []
    for sound in truth.sounds:
        clip = "".join(truth.rng.choices("abcXYZ019-_", k=11))
        name = truth.rng.choice([f"{clip}.wav", f"Y{clip}.wav", f"{clip}_30.wav"])
        write_sound(truth, sound.number, root / f"part{sound.number % 2}" / name)
        captions = truth.rng.sample(TEXTS, 5)
        rows += [[str(len(rows)), clip, "30", caption] for caption in captions]
        asked.append(Asked(sound.number, ("AudioCaps",), captions[0]))
    write_csv(root / "test.csv", rows)
    return asked


def write_esc50(truth: Truth, root: Path) -> list[Asked]:
    rows, asked = [["filename", "fold", "target", "category"]], []
    names = {sound.number: truth.rng.choice(CLASSES) for sound in truth.sounds}
    for sound in truth.sounds:
        file = write_sound(truth, sound.number, root / "audio" / sound.file.replace("/", "-"))
        rows.append([Path(file).name, "1", "0", names[sound.number]])
        asked.append(Asked(sound.number, listed(names.values()), names[sound.number].replace("_", " ")))
    write_csv(root / "meta" / "esc50.csv", rows)
    return asked


def write_gtzan(truth: Truth, root: Path) -> list[Asked]:
    names = {sound.number: truth.rng.choice(["rock", "hip hop", "naïve"]) for sound in truth.sounds}
    for sound in truth.sounds:
        write_sound(truth, sound.number, root / "genres" / names[sound.number] / f"x.{sound.number:05d}.wav")
    return [Asked(number, listed(names.values()), name) for number, name in names.items()]


def write_librispeech(truth: Truth, root: Path) -> list[Asked]:
    asked = []
    for sound in truth.sounds:
        name = f"{sound.number}-7-0000"
        folder = root / str(sound.number) / "7"
        write_sound(truth, sound.number, folder / f"{name}.flac")
        text = truth.rng.choice(["IT'S  TWO SPACES", "ÜBER ALL", "A"])
        (folder / f"{sound.number}-7.trans.txt").write_text(f"{name} {text}\n", encoding="utf-8")
        asked.append(Asked(sound.number, ("word for word",), text))
    return asked


LAYOUTS: dict[str, Callable[[Truth, Path], list[Asked]]] = {
    "mmau": lambda truth, root: write_multiple_choice(truth, root, "mmau"),
    "mmar": lambda truth, root: write_multiple_choice(truth, root, "mmar"),
    "mmsu": lambda truth, root: write_multiple_choice(truth, root, "mmsu"),
    "clotho": write_clotho,
    "audiocaps": write_audiocaps,
    "esc50": write_esc50,
    "gtzan": write_gtzan,
    "librispeech": write_librispeech,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_benchmark_asks_what_it_was_written_to_ask(kind: str, seed: int, tmp_path: Path) -> None:
    truth = make_truth(seed, items=12)
    root = tmp_path / "benchmark"
    root.mkdir()
    asked = LAYOUTS[kind](truth, root)
    contracts = {"log_mel": describe_encoder(LogMelConfig())}
    clips = BenchmarkClips(BENCHMARKS[kind](root), lambda: AudioEncoders(contracts, {}, "cpu"))
    template = ChatTemplate(load_tokenizer(write_language_model(tmp_path / "lm")), SYSTEM, max_text_tokens=10_000)
    remaining = list(asked)
    for index in range(len(clips)):
        clip = clips.clip(index)
        sound = loudest_sound(clips.features(index, clip.clip_id)["log_mel"], truth.sounds)
        for question in clip.questions:
            asked_for = template.prompt_of(question)
            prompt = user_text(characters(asked_for.prefix + asked_for.suffix))
            match = next((a for a in remaining if a.sound == sound and is_asked(a, prompt, question.answer)), None)
            assert match is not None, f"sound {sound} is asked {prompt!r}, with the answer {question.answer!r}"
            remaining.remove(match)
    assert not remaining


def is_asked(asked: Asked, prompt: str, answer: str) -> bool:
    """Returns whether a prompt holds the texts of a question in their order, and has its answer."""
    position = 0
    for text in asked.texts:
        position = prompt.find(text.strip(), position)
        if position < 0:
            return False
        position += len(text.strip())
    return answer.strip() == asked.answer.strip()


def user_text(prompt: str) -> str:
    before, _, text = prompt.partition(AUDIO)
    assert before == f"◖im_start◗system\n{SYSTEM}◖im_end◗\n◖im_start◗user\n"
    text, _, after = text.rpartition("◖im_end◗")
    assert after == "\n◖im_start◗assistant\n" and "◖" not in text
    return text


def listed(names: object) -> tuple[str, ...]:
    return tuple(sorted({str(name).replace("_", " ") for name in names}))  # type: ignore[attr-defined]


def write_sound(truth: Truth, number: int, file: Path) -> str:
    """Writes a sound; returns its path relative to the grandparent of its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, truth.sounds[number].samples(), RATE_HZ)
    return f"./{file.parent.name}/{file.name}"


def write_csv(file: Path, rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
