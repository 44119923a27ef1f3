"""Plans a feature set: assigns clips to fixed partitions on disk, so that every attempt does the same work."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_prep.audio.fragments import split_fragment
from data_prep.config import PrepareConfig
from data_prep.files import container, is_remote
from data_prep.job.commits import RejectedClip
from data_prep.job.store import Store
from data_prep.manifests.clips import Clip, RejectedRow
from data_prep.manifests.reader import audio_path, audio_roots, manifest_sha256, read_clips
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import EncoderContract
from pipeline.core.records import Strict

PLAN = "plan"
PLAN_FILE = f"{PLAN}/plan.json"


class PlannedPartition(Strict):
    """One partition of the plan.

    Attributes:
        clips: number of clips.
        audio_sha256: hash of what the features depend on: ids and audio paths.
        rows_sha256: hash of the whole rows, questions included.
        conversations: number of questions that name other clips.
    """

    clips: int
    audio_sha256: str
    rows_sha256: str
    conversations: int = 0


class Plan(Strict):
    """The plan of a feature set.

    Attributes:
        settings: the settings that the content of the set depends on; see `plan_settings`.
        manifest_sha256: hash of the manifests that the plan was made from.
        partitions: partitions in order.
        rejects: clips that are rejected without reading their audio: duplicate ids, paths outside the root.
    """

    settings: dict[str, Any]
    manifest_sha256: str
    partitions: list[PlannedPartition]
    rejects: list[RejectedClip]

    @property
    def clips(self) -> int:
        """Number of clips in the manifest, rejects included."""
        return sum(partition.clips for partition in self.partitions) + len(self.rejects)


def plan_settings(config: PrepareConfig, contracts: dict[str, EncoderContract]) -> dict[str, Any]:
    """Returns all settings that the content of the finished set depends on, apart from the manifest."""
    return {
        "encoders": {name: contract.fingerprint for name, contract in contracts.items()},
        "format": config.format,
        # Sets that were planned before segments were read have no `start` and `end`.
        "table": {
            key: value
            for key, value in config.table.model_dump().items()
            if value is not None or key not in ("start", "end")
        },
        "partition_clips": config.partition_clips,
        "batch_s": config.batch_s,
        "max_clip_s": config.max_clip_s,
        "max_attempts": config.max_attempts,
    }


def load_plan(store: Store) -> Plan | None:
    """Reads the plan of a feature set; None when there is none yet."""
    try:
        return Plan.model_validate_json(store.read(PLAN_FILE))
    except FileNotFoundError:
        return None


def require_same_settings(plan: Plan, settings: dict[str, Any], output: str) -> None:
    """Checks the settings against an existing plan; encoders may be added, nothing else may change.

    Raises:
        UserError: the output folder holds a set with other settings; names the first difference.
    """
    for key, planned in plan.settings.items():
        value = settings.get(key)
        if key == "encoders":
            value = {name: settings[key].get(name) for name in planned}
        if planned != value:
            raise UserError(
                output,
                f"was started with other settings ({key}: {planned}, now {value})",
                "choose another `output` or restore those settings",
            )


def make_plan(config: PrepareConfig, settings: dict[str, Any], store: Store, old: Plan | None) -> Plan:
    """Reads the manifest once and writes its partitions, then `plan.json`, which makes the plan valid.

    Clips of an old plan keep their partitions and get their current questions; new clips go to new partitions.

    Raises:
        UserError: the manifest is invalid or empty, too many audio files do not exist, or a clip of the old plan is
            missing or has other audio.
    """
    planned = dict(_planned_clips(store, old))
    first_new = len(old.partitions) if old else 0
    seen_clips: set[str] = set()
    rejects: list[RejectedClip] = []
    new_clips = 0
    database = sqlite3.connect("")  # on disk once it is large
    database.execute("CREATE TABLE clips (part INTEGER, position INTEGER, row TEXT)")
    for clip in read_clips(config):
        if isinstance(clip, RejectedRow):
            rejects.append(RejectedClip(**clip.model_dump()))
            continue
        seen_clips.add(clip.clip_id)
        if clip.clip_id in planned:
            part, position, audio = planned[clip.clip_id]
            if audio != _audio_key(clip):
                raise UserError(config.output, f"holds clip {clip.clip_id} with other audio", "choose another `output`")
        else:
            part, position = first_new + new_clips // config.partition_clips, new_clips % config.partition_clips
            new_clips += 1
        database.execute("INSERT INTO clips VALUES (?, ?, ?)", (part, position, clip.model_dump_json()))
    for clip_id in planned.keys() - seen_clips:
        raise UserError(config.output, f"holds clip {clip_id}, the manifest does not", "choose another `output`")
    manifests = ", ".join(config.manifests)
    check_rows(config, rejects, len(seen_clips))

    partitions: list[PlannedPartition] = []
    missing: list[str] = []
    ordered = database.execute("SELECT part, row FROM clips ORDER BY part, position")
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
                conversations=sum(question.clips is not None for clip in clips for question in clip.questions),
            )
        )
    database.close()
    plan = Plan(settings=settings, manifest_sha256=manifest_sha256(config), partitions=partitions, rejects=rejects)
    if len(missing) > config.max_reject_fraction * plan.clips:
        raise missing_audio(manifests, len(missing), plan.clips, missing[0])
    store.write(PLAN_FILE, (plan.model_dump_json(indent=1) + "\n").encode())
    return plan


def check_rows(config: PrepareConfig, rejects: Sequence[RejectedClip | RejectedRow], clips: int) -> None:
    """Checks that there are clips, and that no more rows than allowed are unsupported or leave their root.

    Args:
        clips: number of accepted clips.

    Raises:
        UserError: there are no clips, too many paths leave the root, or too many rows hold what a set cannot.
    """
    manifests = ", ".join(config.manifests)
    outside = [reject for reject in rejects if reject.reason == "outside_root"]
    if len(outside) > config.max_reject_fraction * (clips + len(rejects)):
        raise UserError(
            manifests,
            f"{len(outside)} of {clips + len(rejects)} audio paths leave the audio folder; {outside[0].detail}",
            "map the start of these paths to your folder, for example `audio_paths: {/data/sls/audioset: audioset}`",
        )
    unsupported = [reject for reject in rejects if reject.reason == "unsupported"]
    if len(unsupported) > config.max_reject_fraction * (clips + len(rejects)):
        example = unsupported[0]
        raise UserError(
            manifests,
            f"{len(unsupported)} of {clips + len(rejects)} rows hold what a feature set cannot keep, more than "
            f"max_reject_fraction {config.max_reject_fraction}; for example {example.clip_id}: {example.detail}",
            "remove these rows, or raise `max_reject_fraction` to leave them out",
        )
    if not clips:
        first = f": {len(rejects)} rows are rejected, the first because {rejects[0].detail}" if rejects else ""
        raise UserError(manifests, f"holds no clip to prepare{first}", "give a manifest with clips")


def _planned_clips(store: Store, plan: Plan | None) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """Yields partition, position and audio of each clip of a plan, by id."""
    for part in range(len(plan.partitions) if plan else 0):
        for position, clip in enumerate(read_partition_clips(store, part)):
            yield clip.clip_id, (part, position, _audio_key(clip))


def _audio_key(clip: Clip) -> str:
    segment = [] if clip.start_s is None and clip.end_s is None else [clip.start_s, clip.end_s]
    return json.dumps([clip.clip_id, clip.root, clip.audio, *segment])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def missing_audio(manifests: str, missing: int, clips: int, example: str) -> UserError:
    """Returns the error for too many audio files that do not exist."""
    return UserError(
        manifests,
        f"{missing} of {clips} audio paths do not exist, for example {example}",
        "correct the paths or `audio_root`, map their start to your folder in `audio_paths`, or raise "
        "`max_reject_fraction`",
    )


def read_partition_clips(store: Store, partition: int) -> list[Clip]:
    """Reads the clips of a planned partition."""
    return [Clip.model_validate(json.loads(line)) for line in store.read(_rows_name(partition)).splitlines()]


def _missing(config: PrepareConfig, clips: list[Clip]) -> Iterator[str]:
    roots = audio_roots(config)
    files = (split_fragment(audio_path(clip, roots))[0] for clip in clips if clip.audio is not None)
    paths = list(dict.fromkeys(map(container, files)))
    paths = [path for path in paths if not is_remote(path)]  # an object store is queried once per clip, when it is read
    with ThreadPoolExecutor(16) as pool:  # lookups on network file systems are slow
        for path, exists in zip(paths, pool.map(os.path.exists, paths), strict=True):
            if not exists:
                yield path


def _rows_name(partition: int) -> str:
    return f"{PLAN}/{partition:05}.jsonl"
