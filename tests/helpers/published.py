"""Writes small benchmarks in the layouts of their publishers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import soundfile

from tests.helpers.corpora import tone

VOICES = ("A child", "A woman", "An adult man", "A teenager")


def write_rows(kind: str, root: Path, **changes: Any) -> Path:
    """Writes a benchmark of two questions about one clip; returns its folder.

    Args:
        kind: `mmau` or `mmar`.
        changes: values that replace those of the first row; None removes a key.
    """
    root.mkdir(exist_ok=True)
    soundfile.write(root / "clip.wav", tone(0.5, 16000), 16000)
    row = {
        "id": "q1",
        "question": "Who speaks?",
        "choices": list(VOICES),
        "answer": "A woman",
        "sub-category": "Speaker",
        "extra": "kept",
    }
    row |= {"audio_id": "./clip.wav", "task": "speech"} if kind == "mmau" else {}
    row |= {"audio_path": "./clip.wav", "modality": "speech"} if kind == "mmar" else {}
    row |= changes
    rows = [{k: v for k, v in row.items() if v is not None}, {**row, "id": "q2", "question": "Who else?"}]
    name = {"mmau": "mmau-test-mini.json", "mmar": "MMAR-meta.jsonl"}[kind]
    text = json.dumps(rows) if kind == "mmau" else "\n".join(map(json.dumps, rows))
    (root / name).write_text(text)
    return root


def write_audio(file: Path) -> None:
    """Writes a short tone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, tone(0.3, 16000), 16000)


def write_text(file: Path, text: str) -> None:
    """Writes a text file and creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
