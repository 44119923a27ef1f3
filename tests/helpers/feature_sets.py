"""Tiny feature sets, written by MDSWriter as in preparation, and a tiny tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.core.feature_contract import (
    CLIP_COLUMNS,
    CLIPS,
    CONTRACT_FILE,
    FEATURE_COLUMNS,
    EncoderContract,
    FeatureContract,
)
from pipeline.core.ranks import read_ranks

read_ranks()  # sets LOCAL_WORLD_SIZE, which streaming reads on import
from streaming import MDSWriter  # noqa: E402

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with one token per byte, which encodes every text and needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def frames_of(clip: int, width: int) -> np.ndarray:
    """Returns the features of a clip: the length depends on the clip, and each value identifies it."""
    return np.full((3 + clip % 4, width), clip, np.float16) + np.arange(width, dtype=np.float16) / 8


def write_feature_set(
    folder: Path,
    questions_per_clip: Sequence[int],
    *,
    encoders: dict[str, int] | None = None,
    clips_per_shard: int = 4,
    tasks: Sequence[str] = ("what", "count"),
    datasets: Sequence[str] = ("synth",),
) -> Path:
    """Writes a set of len(questions_per_clip) clips: clip c has id `clip-c` and dataset datasets[c % len], its question
    q has id `clip-c/q` and task tasks[q % len]."""
    encoders = {"log_mel": 8} if encoders is None else encoders
    rows = [
        {
            "clip_id": f"clip-{clip}",
            "duration_s": 1.0 + clip,
            "dataset": datasets[clip % len(datasets)],
            "domain": "sound",
            "questions": [
                {
                    "question_id": f"clip-{clip}/{number}",
                    "question": f"Question {number} about clip {clip}" + "?" * (1 + number),
                    "answer": f"answer {clip}.{number}",
                    "task": tasks[number % len(tasks)],
                }
                for number in range(count)
            ],
        }
        for clip, count in enumerate(questions_per_clip)
    ]
    frames = {name: [frames_of(clip, width) for clip in range(len(rows))] for name, width in encoders.items()}
    return write_rows(folder, rows, frames, clips_per_shard=clips_per_shard)


def write_rows(
    folder: Path, rows: list[dict], frames: dict[str, list[np.ndarray]], *, clips_per_shard: int = 4
) -> Path:
    """Writes a set of these clips (columns of `CLIP_COLUMNS`) with frames (encoder -> one array for each clip)."""
    samples = [{"audio": "", **row} for row in rows]
    _write_column(folder / CLIPS, CLIP_COLUMNS, samples, clips_per_shard)
    for name, arrays in frames.items():
        samples = [{"clip_id": row["clip_id"], "features": a} for row, a in zip(rows, arrays, strict=True)]
        _write_column(folder / name, FEATURE_COLUMNS, samples, clips_per_shard)
    contract = FeatureContract(
        encoders={
            name: EncoderContract(
                kind=name, revision="1", sample_rate_hz=16000, frame_rate_hz=25.0, width=arrays[0].shape[1]
            )
            for name, arrays in frames.items()
        },
        clips=len(rows),
        questions=sum(len(row["questions"]) for row in rows),
        rejected=0,
        audio_hours=0.0,
        manifest_sha256="0" * 64,
    )
    (folder / CONTRACT_FILE).write_text(contract.dump())
    return folder


def _write_column(folder: Path, columns: dict[str, str], samples: list[dict], clips_per_shard: int) -> None:
    """Writes partitions of `clips_per_shard` clips with a merged index, the layout of parallel writers."""
    shards = []
    for number, first in enumerate(range(0, len(samples), clips_per_shard)):
        part = folder / f"part-{number:05d}"
        with MDSWriter(out=str(part), columns=columns, hashes=["xxh64"]) as writer:
            for sample in samples[first : first + clips_per_shard]:
                writer.write(sample)
        index = json.loads((part / "index.json").read_text())
        for shard in index["shards"]:
            shard["raw_data"]["basename"] = f"{part.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
