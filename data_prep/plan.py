"""The plan of a feature set: clips in fixed partitions, on disk, so that every attempt does the same work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.commits import RejectedClip
from data_prep.config import PrepareConfig
from data_prep.files import container, is_remote
from data_prep.manifest import Clip, audio_path, audio_roots, manifest_sha256, read_clips
from data_prep.storage import LocalStore
from pipeline.errors import UserError
from pipeline.features import EncoderContract

PLAN = "plan"
PLAN_FILE = f"{PLAN}/plan.json"


class PlannedPartition(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    clips: int
    sha256: str


class Plan(BaseModel):
    """What there is to do. `rejects` are rows that need no look at their audio: duplicate ids, paths out of bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    manifest_sha256: str
    partitions: list[PlannedPartition]
    rejects: list[RejectedClip]

    @property
    def clips(self) -> int:
        """Rows of the manifest, rejects included."""
        return sum(partition.clips for partition in self.partitions) + len(self.rejects)


def settings_of(config: PrepareConfig, contracts: dict[str, EncoderContract]) -> dict[str, Any]:
    """Everything that decides what the finished set holds, but for the manifest."""
    return {
        "encoders": {name: contract.fingerprint for name, contract in contracts.items()},
        "format": config.format,
        "table": config.table.model_dump(),
        "partition_clips": config.partition_clips,
        "batch_s": config.batch_s,
        "max_clip_s": config.max_clip_s,
        "max_attempts": config.max_attempts,
    }


def load_plan(store: LocalStore) -> Plan | None:
    try:
        return Plan.model_validate_json(store.read(PLAN_FILE))
    except FileNotFoundError:
        return None


def require_same_settings(plan: Plan, settings: dict[str, Any], output: str) -> None:
    """Raises UserError when the output folder holds a set of other settings; the first difference is named."""
    for key, value in settings.items():
        if plan.settings.get(key) != value:
            raise UserError(
                output,
                f"was begun with other settings ({key}: {plan.settings.get(key)}, now {value})",
                "choose another `output` or go back to those settings",
            )


def make_plan(config: PrepareConfig, settings: dict[str, Any], store: LocalStore) -> Plan:
    """Reads the manifest once and writes its partitions; `plan.json` comes last and makes the plan valid.

    Raises:
        UserError: a fault of the manifest; no clips at all; too many audio files that do not exist.
    """
    store.remove(PLAN)
    seen_clips: set[str] = set()
    seen_questions: set[str] = set()
    rejects: list[RejectedClip] = []
    partitions: list[PlannedPartition] = []
    pending: list[Clip] = []
    missing: list[str] = []

    def flush() -> None:
        missing.extend(_missing(config, pending))
        data = "".join(clip.model_dump_json() + "\n" for clip in pending).encode()
        store.write(_rows_name(len(partitions)), data)
        partitions.append(PlannedPartition(clips=len(pending), sha256=hashlib.sha256(data).hexdigest()))
        pending.clear()

    for clip in read_clips(config):
        question_ids = [question.question_id for question in clip.questions]
        if clip.clip_id in seen_clips:
            reason, detail = "duplicate_id", "clip_id occurred before"
        elif len(set(question_ids)) < len(question_ids) or not seen_questions.isdisjoint(question_ids):
            reason, detail = "duplicate_id", "a question_id occurred before"
        elif clip.audio is None:
            reason, detail = "outside_root", "the audio path leaves audio_root"
        else:
            reason = ""
        if reason:
            rejects.append(RejectedClip(clip_id=clip.clip_id, reason=reason, detail=detail, audio=clip.audio))
            continue
        seen_clips.add(clip.clip_id)
        seen_questions.update(question_ids)
        pending.append(clip)
        if len(pending) == config.partition_clips:
            flush()
    if pending:
        flush()
    manifests = ", ".join(config.manifests)
    if not partitions:
        raise UserError(manifests, "holds no clip to prepare", "give a manifest with clips")
    plan = Plan(settings=settings, manifest_sha256=manifest_sha256(config), partitions=partitions, rejects=rejects)
    if len(missing) > config.max_reject_fraction * plan.clips:
        raise missing_audio(manifests, len(missing), plan.clips, missing[0])
    store.write(PLAN_FILE, (plan.model_dump_json(indent=1) + "\n").encode())
    return plan


def missing_audio(manifests: str, missing: int, clips: int, example: str) -> UserError:
    return UserError(
        manifests,
        f"{missing} of {clips} audio paths do not exist, for example {example}",
        "correct the paths or `audio_root`, or raise `max_reject_fraction`",
    )


def read_partition_clips(store: LocalStore, partition: int) -> list[Clip]:
    return [Clip.model_validate(json.loads(line)) for line in store.read(_rows_name(partition)).splitlines()]


def _missing(config: PrepareConfig, clips: list[Clip]) -> Iterator[str]:
    roots = audio_roots(config)
    paths = list(dict.fromkeys(container(audio_path(clip, roots)) for clip in clips))
    paths = [path for path in paths if not is_remote(path)]  # a store is asked for each clip once, when it is read
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, one question at a time
        for path, found in zip(paths, pool.map(os.path.exists, paths), strict=True):
            if not found:
                yield path


def _rows_name(partition: int) -> str:
    return f"{PLAN}/{partition:05}.jsonl"
