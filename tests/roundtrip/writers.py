"""Writes one truth in every input format, with what that format can hold of it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import soundfile

from tests.roundtrip.truth import RATE_HZ, Item, Sound, Truth, write_sounds

QUESTION = 'Which class, "exactly"?'


@dataclass(frozen=True)
class Written:
    """A manifest.

    Attributes:
        items: what its publisher meant.
        settings: settings of `PrepareConfig` beside manifest and output.
    """

    manifest: Path
    items: list[Item]
    settings: dict[str, Any] = field(default_factory=dict)


def write_jsonl(truth: Truth, folder: Path) -> Written:
    """Our own format: rows of several questions, several rows about one sound, ids that repeat over sounds."""
    write_sounds(truth, folder)
    rows, items = [], []
    for number, item in enumerate(truth.items):
        if truth.rng.random() < 0.3:
            item = replace(item, choices=["a cat, asleep", 'a "dog"', "neither\u00a0one", item.answer.strip()])
        items.append(item)
        question = {"question": item.question, "answer": item.answer, "task": item.task, "choices": item.choices}
        if truth.rng.random() < 0.5:
            question["question_id"] = f"q{number}"
        same = [row for row in rows if row["sound"] == item.sound and _source(row) == _source(item)]
        if same and truth.rng.random() < 0.5:
            same[0]["questions"].append(question)
        else:
            rows.append(
                {
                    "clip_id": truth.rng.choice([f"clip{item.sound}", f"row{number}", "the same id"]),
                    **_address(truth, item.sound),
                    "dataset": item.dataset,
                    "domain": item.domain,
                    "questions": [question],
                    "sound": item.sound,
                }
            )
    rows = [{key: value for key, value in row.items() if key != "sound"} for row in rows]
    return Written(_json_lines(folder / "m.jsonl", rows, truth), items)


def write_own_conversations(truth: Truth, folder: Path) -> Written:
    """Our own format with turns, system texts and other sounds."""
    write_sounds(truth, folder)
    rows = []
    for item in truth.items:
        others = [number for number in dict.fromkeys(item.sounds) if number != item.sound]
        places = {number: index for index, number in enumerate([item.sound, *others])}
        # `<audio>` in a content of one text is the place of the next sound; in a list, a number is.
        parts = [part for content, answer in item.turns for part in (*content, answer)]
        spelled = any(isinstance(part, str) and "<audio>" in part for part in parts)
        as_text = not spelled and len(set(item.sounds)) == len(item.sounds) and truth.rng.random() < 0.5
        turns = []
        for (content, answer), loss in zip(item.turns, item.loss, strict=True):
            text = "".join("<audio>" if isinstance(part, int) else part for part in content)
            listed = [places[part] if isinstance(part, int) else part for part in content]
            turns.append({"role": "user", "content": text if as_text else listed})
            turns.append({"role": "assistant", "content": answer if as_text else [answer], "loss": loss})
        question = {
            "turns": turns,
            "system": item.system,
            "other_audio": [_address(truth, number) for number in others],
        }
        rows.append({"clip_id": item.item_id, **_address(truth, item.sound), "questions": [question]})
    return Written(_json_lines(folder / "m.jsonl", rows, truth), truth.items)


def write_openaqa(truth: Truth, folder: Path) -> Written:
    """LTU's records; what follows the first line break of a question is its `input`."""
    write_sounds(truth, folder)
    rows = []
    for item in truth.items:
        instruction, _, rest = item.question.partition("\n")
        rows.append(
            {
                "instruction": instruction,
                "input": rest,
                "audio_id": truth.sounds[item.sound].path,
                "dataset": item.dataset,
                "task": item.task,
                "output": item.answer,
            }
        )
    file = folder / "m.json"
    file.write_text(json.dumps(rows, ensure_ascii=truth.rng.random() < 0.5), encoding="utf-8")
    return Written(file, truth.only(domain="d"), {"table": {"domain": "d"}})


def write_slam_llm(truth: Truth, folder: Path) -> Written:
    """SLAM-LLM's lines, whose keys repeat."""
    write_sounds(truth, folder)
    rows = [
        {
            "key": truth.rng.choice(["same", f"u{number}"]),
            "source": truth.sounds[item.sound].path,
            "target": item.answer,
            "prompt": item.question,
        }
        for number, item in enumerate(truth.items)
    ]
    items = truth.only(dataset="D", domain="d", task="t")
    table = {"dataset": "D", "domain": "d", "task": "t"}
    return Written(_json_lines(folder / "m.jsonl", rows, truth), items, {"table": table})


def write_csv(truth: Truth, folder: Path, delimiter: str = ",") -> Written:
    """A table whose templates name every field."""
    write_sounds(truth, folder)
    file = folder / ("m.tsv" if delimiter == "\t" else "m.csv")
    with file.open("w", encoding=truth.rng.choice(["utf-8", "utf-8-sig", "utf-16"]), newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator=truth.rng.choice(["\n", "\r\n"]))
        writer.writerow(["audio", "question", "answer", "dataset", "domain", "task"])
        for item in truth.items:
            audio = truth.sounds[item.sound].path
            writer.writerow([audio, item.question, item.answer, item.dataset, item.domain, item.task])
    return Written(file, truth.items, {"table": _templates("{audio}")})


def write_tsv(truth: Truth, folder: Path) -> Written:
    return write_csv(truth, folder, "\t")


def write_folder(truth: Truth, folder: Path) -> Written:
    """A folder per class with sounds below it; a class is the answer, all classes are the choices."""
    classes = ["rock & roll", "naïve", "a,b", "NA", "C#"]
    root = folder / "genres"
    items = []
    for sound in truth.sounds:
        name = truth.rng.choice(classes)
        file = root / name / sound.file
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, sound.samples(), RATE_HZ, format="WAV")
        items.append(Item(f"{sound.number}", sound.number, [([sound.number, QUESTION], name)]))
    used = sorted({item.answer for item in items})
    return Written(root, [replace(item, choices=used) for item in items], {"table": {"question": QUESTION}})


def write_parquet(truth: Truth, folder: Path) -> Written:
    """A Hugging Face dataset with embedded audio, a row per question, whose paths repeat over different sounds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "sound": {"bytes": wav(truth.sounds[item.sound]), "path": truth.rng.choice(["same.wav", None])},
            "question": item.question,
            "answer": item.answer,
            "dataset": item.dataset,
            "domain": item.domain,
            "task": item.task,
        }
        for item in truth.items
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "m.parquet", row_group_size=5)
    return Written(folder / "m.parquet", truth.items, {"table": _templates("{audio}")})


def write_webdataset(truth: Truth, folder: Path) -> Written:
    """A tar file with a WAV and a JSON file for each question."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "m.tar", "w") as tar:
        for number, item in enumerate(truth.items):
            fields = {name: getattr(item, name) for name in ("question", "answer", "dataset", "domain", "task")}
            members = {"wav": wav(truth.sounds[item.sound]), "json": json.dumps(fields).encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"part/{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return Written(folder / "m.tar", truth.items, {"table": _templates("{audio}")})


def write_messages(truth: Truth, folder: Path, keys: str = "messages") -> Written:
    """Chats of ms-swift (`messages`) or ShareGPT (`conversations`), with a placeholder for each sound."""
    write_sounds(truth, folder)
    rows = []
    for item in truth.items:
        turns = _chat(item, keys, lambda _: "<audio>")
        rows.append({keys: turns, "audios": [truth.sounds[number].path for number in item.sounds]})
    items = truth.only(dataset="D", domain="d", task="t")
    settings = {"table": {"dataset": "D", "domain": "d", "task": "t"}}
    return Written(_json_lines(folder / "m.jsonl", rows, truth), items, settings)


def write_sharegpt(truth: Truth, folder: Path) -> Written:
    return write_messages(truth, folder, "conversations")


def write_audio_flamingo(truth: Truth, folder: Path) -> Written:
    """Conversations of Audio Flamingo 3."""
    write_sounds(truth, folder)
    rows = []
    for item in truth.items:
        sounds = [truth.sounds[number].path for number in item.sounds]
        turns = _chat(item, "conversations", lambda _: "<sound>")
        rows.append({"sound": sounds[0] if len(sounds) == 1 else sounds, "conversations": turns})
    items = truth.only(dataset="unspecified", domain="unspecified", task="unspecified")
    return Written(_json_lines(folder / "m.jsonl", rows, truth), items)


def write_parts(truth: Truth, folder: Path) -> Written:
    """Messages whose content is a list of parts, as of OpenAI and Qwen."""
    write_sounds(truth, folder)
    rows = []
    for item in truth.items:
        messages = [] if item.system is None else [{"role": "system", "content": item.system}]
        for (content, answer), loss in zip(item.turns, item.loss or [True] * len(item.turns), strict=True):
            parts = [
                {"type": "audio", "audio": truth.sounds[part].path}
                if isinstance(part, int)
                else {"type": "text", "text": part}
                for part in content
            ]
            messages.append({"role": "user", "content": parts})
            reply: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(reply if loss else {**reply, "loss": False})
        rows.append({"messages": messages})
    items = truth.only(dataset="unspecified", domain="unspecified", task="unspecified")
    return Written(_json_lines(folder / "m.jsonl", rows, truth), items, {"format": "messages"})


PLAIN: dict[str, Callable[[Truth, Path], Written]] = {
    "jsonl": write_jsonl,
    "openaqa": write_openaqa,
    "slam_llm": write_slam_llm,
    "csv": write_csv,
    "tsv": write_tsv,
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
}
CHATS: dict[str, Callable[[Truth, Path], Written]] = {
    "messages": write_messages,
    "sharegpt": write_sharegpt,
    "audio_flamingo": write_audio_flamingo,
    "parts": write_parts,
}


def _chat(item: Item, keys: str, place: Callable[[int], str]) -> list[dict[str, Any]]:
    """Returns the turns of an item in the keys of `messages` or `conversations`."""
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    role_key, text_key = "role", "content"
    if keys == "conversations":
        roles, role_key, text_key = {"system": "system", "user": "human", "assistant": "gpt"}, "from", "value"
    turns = [] if item.system is None else [{role_key: roles["system"], text_key: item.system}]
    for (content, answer), loss in zip(item.turns, item.loss or [True] * len(item.turns), strict=True):
        text = "".join(place(part) if isinstance(part, int) else part for part in content)
        turns.append({role_key: roles["user"], text_key: text})
        reply: dict[str, Any] = {role_key: roles["assistant"], text_key: answer}
        turns.append(reply if loss else {**reply, "loss": False})
    return turns


def _address(truth: Truth, number: int) -> dict[str, Any]:
    """Returns the fields of our own format that name a sound."""
    sound = truth.sounds[number]
    if sound.start_s is None or truth.rng.random() < 0.5:
        return {"audio": sound.path}
    return {"audio": sound.file, "start_s": sound.start_s, "end_s": sound.end_s}


def _source(row: dict[str, Any] | Item) -> tuple[str, str]:
    return (row.dataset, row.domain) if isinstance(row, Item) else (row["dataset"], row["domain"])


def _json_lines(file: Path, rows: list[dict[str, Any]], truth: Truth) -> Path:
    ascii_only = truth.rng.random() < 0.5
    file.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    return file


def _templates(audio: str) -> dict[str, Any]:
    fields = {name: f"{{{name}}}" for name in ("question", "dataset", "domain", "task")}
    return {**fields, "audio": audio, "answers": ["{answer}"]}


def wav(sound: Sound) -> bytes:
    """Returns the bytes of a sound's WAV file."""
    stream = io.BytesIO()
    soundfile.write(stream, sound.samples(), RATE_HZ, format="WAV")
    return stream.getvalue()
