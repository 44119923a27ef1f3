"""The plan of a feature set: clips in fixed partitions, on disk, so that every attempt does the same work."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.config import PrepareConfig
from data_prep.files import container, is_remote
from data_prep.job.commits import RejectedClip
from data_prep.job.store import Store
from data_prep.manifests.manifest import Clip, audio_path, audio_roots, manifest_sha256, read_clips
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract

PLAN = "plan"
PLAN_FILE = f"{PLAN}/plan.json"


class PlannedPartition(BaseModel):
    """`audio_sha256` is of what the features depend on (ids and audio), `rows_sha256` of all, questions included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clips: int
    audio_sha256: str
    rows_sha256: str


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


def load_plan(store: Store) -> Plan | None:
    try:
        return Plan.model_validate_json(store.read(PLAN_FILE))
    except FileNotFoundError:
        return None


def require_same_settings(plan: Plan, settings: dict[str, Any], output: str) -> None:
    """Encoders may be added; everything else must be as it was.

    Raises:
        UserError: the folder holds a set of other settings; the first difference is named.
    """
    for key, begun in plan.settings.items():
        value = settings.get(key)
        if key == "encoders":
            value = {name: settings[key].get(name) for name in begun}
        if begun != value:
            raise UserError(
                output,
                f"was begun with other settings ({key}: {begun}, now {value})",
                "choose another `output` or go back to those settings",
            )


def make_plan(config: PrepareConfig, settings: dict[str, Any], store: Store, old: Plan | None) -> Plan:
    """Reads the manifest once and writes its partitions; `plan.json` comes last and makes the plan valid.

    Clips of an old plan stay where they are, with the questions that they have now; new ones go to new partitions.

    Raises:
        UserError: a fault of the manifest; no clips at all; too many audio files that do not exist; a clip of the old
            plan that is gone or has other audio.
    """
    begun = dict(_planned_clips(store, old))
    first_new = len(old.partitions) if old else 0
    seen_clips: set[str] = set()
    seen_questions: set[str] = set()
    rejects: list[RejectedClip] = []
    new = 0
    database = sqlite3.connect("")  # on disk once it is large
    database.execute("CREATE TABLE waiting (part INTEGER, position INTEGER, row TEXT)")
    for clip in read_clips(config):
        reject = _reject(clip, seen_clips, seen_questions, needs_audio=bool(config.encoders))
        if reject is not None:
            rejects.append(reject)
            continue
        seen_clips.add(clip.clip_id)
        seen_questions.update(question.question_id for question in clip.questions)
        if clip.clip_id in begun:
            part, position, audio = begun[clip.clip_id]
            if audio != _audio_key(clip):
                raise UserError(config.output, f"holds clip {clip.clip_id} of other audio", "choose another `output`")
        else:
            part, position = first_new + new // config.partition_clips, new % config.partition_clips
            new += 1
        database.execute("INSERT INTO waiting VALUES (?, ?, ?)", (part, position, clip.model_dump_json()))
    for gone in begun.keys() - seen_clips:
        raise UserError(config.output, f"holds clip {gone}, the manifest does not", "choose another `output`")
    manifests = ", ".join(config.manifests)
    if not seen_clips:
        raise UserError(manifests, "holds no clip to prepare", "give a manifest with clips")

    partitions: list[PlannedPartition] = []
    missing: list[str] = []
    ordered = database.execute("SELECT part, row FROM waiting ORDER BY part, position")
    for part, group in itertools.groupby(ordered, key=lambda pair: pair[0]):
        rows = [row for _, row in group]
        clips = [Clip.model_validate_json(row) for row in rows]
        if part >= first_new:
            missing += _missing(config, clips)
        data = "".join(f"{row}\n" for row in rows).encode()
        store.write(_rows_name(part), data)
        partitions.append(
            PlannedPartition(
                clips=len(rows),
                audio_sha256=_sha256("".join(f"{_audio_key(clip)}\n" for clip in clips).encode()),
                rows_sha256=_sha256(data),
            )
        )
    database.close()
    plan = Plan(settings=settings, manifest_sha256=manifest_sha256(config), partitions=partitions, rejects=rejects)
    if len(missing) > config.max_reject_fraction * plan.clips:
        raise missing_audio(manifests, len(missing), plan.clips, missing[0])
    store.write(PLAN_FILE, (plan.model_dump_json(indent=1) + "\n").encode())
    return plan


def _reject(clip: Clip, seen_clips: set[str], seen_questions: set[str], *, needs_audio: bool) -> RejectedClip | None:
    question_ids = [question.question_id for question in clip.questions]
    if clip.clip_id in seen_clips:
        reason, detail = "duplicate_id", "clip_id occurred before"
    elif len(set(question_ids)) < len(question_ids) or not seen_questions.isdisjoint(question_ids):
        reason, detail = "duplicate_id", "a question_id occurred before"
    elif clip.audio is None and needs_audio:
        reason, detail = "outside_root", "the audio path leaves audio_root"
    else:
        return None
    return RejectedClip(clip_id=clip.clip_id, reason=reason, detail=detail, audio=clip.audio)


def _planned_clips(store: Store, plan: Plan | None) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """Partition, position and audio of each clip of a plan, by id."""
    for part in range(len(plan.partitions) if plan else 0):
        for position, clip in enumerate(read_partition_clips(store, part)):
            yield clip.clip_id, (part, position, _audio_key(clip))


def _audio_key(clip: Clip) -> str:
    return json.dumps([clip.clip_id, clip.root, clip.audio])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def missing_audio(manifests: str, missing: int, clips: int, example: str) -> UserError:
    return UserError(
        manifests,
        f"{missing} of {clips} audio paths do not exist, for example {example}",
        "correct the paths or `audio_root`, or raise `max_reject_fraction`",
    )


def read_partition_clips(store: Store, partition: int) -> list[Clip]:
    return [Clip.model_validate(json.loads(line)) for line in store.read(_rows_name(partition)).splitlines()]


def _missing(config: PrepareConfig, clips: list[Clip]) -> Iterator[str]:
    roots = audio_roots(config)
    paths = list(dict.fromkeys(container(audio_path(clip, roots)) for clip in clips if clip.audio is not None))
    paths = [path for path in paths if not is_remote(path)]  # a store is asked for each clip once, when it is read
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, one question at a time
        for path, found in zip(paths, pool.map(os.path.exists, paths), strict=True):
            if not found:
                yield path


def _rows_name(partition: int) -> str:
    return f"{PLAN}/{partition:05}.jsonl"
