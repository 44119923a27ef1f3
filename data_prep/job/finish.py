"""Finishes a feature set: merges indexes, writes rejects, config and contract, and removes what is not part of it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from data_prep.config import PrepareConfig
from data_prep.job.commits import (
    INDEX,
    REJECTS,
    WARNINGS,
    ClipWarning,
    Commit,
    RejectedClip,
    column_names,
    merged_index,
    remove_uncommitted,
)
from data_prep.job.errors import PreparationFailed
from data_prep.job.partitions import Plan, missing_audio, read_partition_clips
from data_prep.job.store import SCRATCH, Store
from pipeline.config.loading import dump_config
from pipeline.core.feature_contract import CONTRACT_FILE, EncoderContract, FeatureContract

CONFIG_FILE = "prepare.yaml"


def finish_feature_set(
    config: PrepareConfig,
    contracts: dict[str, EncoderContract],
    plan: Plan,
    commits: list[Commit],
    store: Store,
) -> FeatureContract:
    """Writes the merged indexes, the rejects, the config and, last, the contract, which makes it a feature set.

    Args:
        commits: commit records of all partitions, in order.

    Raises:
        UserError: too many clips are rejected, mostly because files do not exist.
        PreparationFailed: too many clips are rejected for other reasons, or several kinds of devices were used.
    """
    conversations = _rejected_conversations(plan, commits, store)
    rejects = [*all_rejects(plan, {commit.partition: commit for commit in commits}), *conversations]
    _check_fraction(config, plan, rejects)
    columns = column_names(contracts)
    contract = FeatureContract(
        encoders={
            name: contract.model_copy(
                update={"software": {**contract.software, "device": _device(config, name, commits)}}
            )
            for name, contract in contracts.items()
        },
        clips=sum(commit.clips for commit in commits),
        questions=sum(commit.questions for commit in commits) - len(conversations),
        rejected=len(rejects),
        audio_hours=sum(commit.audio_s for commit in commits) / 3600,
        manifest_sha256=plan.manifest_sha256,
    )
    files = {f"{column}/{INDEX}": merged_index(store, column, commits) for column in columns}
    files[REJECTS] = "".join(reject.model_dump_json() + "\n" for reject in rejects).encode()
    warnings = all_warnings(commits)
    if warnings or store.size(WARNINGS) is not None:
        files[WARNINGS] = "".join(warning.model_dump_json() + "\n" for warning in warnings).encode()
    files[CONFIG_FILE] = dump_config(config).encode()
    files[CONTRACT_FILE] = contract.dump().encode()
    if any(store.size(name) != len(data) or store.read(name) != data for name, data in files.items()):
        store.remove(CONTRACT_FILE)  # no reader may see new indexes with an old contract
        for name, data in files.items():
            store.write(name, data)
    remove_uncommitted(store, columns, commits, keep_indexed=False)
    store.remove(SCRATCH)
    return contract


def check_rejects(config: PrepareConfig, plan: Plan, commits: Mapping[int, Commit]) -> list[RejectedClip]:
    """Returns all clips rejected so far.

    Raises:
        UserError: too many, mostly because files do not exist.
        PreparationFailed: too many for other reasons.
    """
    rejects = all_rejects(plan, commits)
    _check_fraction(config, plan, rejects)
    return rejects


def _rejected_conversations(plan: Plan, commits: Sequence[Commit], store: Store) -> list[RejectedClip]:
    """Returns the conversations about clips of the set that name a rejected clip; readers of the set leave them out."""
    rejected = {reject.clip_id: reject.reason for commit in commits for reject in commit.rejects}
    conversations = []
    for partition, planned in enumerate(plan.partitions):
        if not rejected or not planned.conversations:
            continue
        for clip in read_partition_clips(store, partition):
            for question in clip.questions if clip.clip_id not in rejected else ():
                missing = next((clip_id for clip_id in question.clips or () if clip_id in rejected), None)
                if missing is not None:
                    detail = f"clip '{missing}' of the conversation is rejected ({rejected[missing]})"
                    conversations.append(
                        RejectedClip(
                            clip_id=clip.clip_id, question_id=question.question_id, reason="missing_clip", detail=detail
                        )
                    )
    return conversations


def _check_fraction(config: PrepareConfig, plan: Plan, rejects: Sequence[RejectedClip]) -> None:
    if len(rejects) <= config.max_reject_fraction * plan.clips:
        return
    reasons = collections.Counter(reject.reason for reject in rejects).most_common(3)
    example = next(reject for reject in rejects if reject.reason == reasons[0][0])
    if reasons[0][0] == "missing":
        raise missing_audio(", ".join(config.manifests), reasons[0][1], plan.clips, str(example.audio))
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    conversations = sum(reject.question_id is not None for reject in rejects)
    rejected = f"{len(rejects) - conversations} of {plan.clips} clips"
    rejected += f" and {conversations} conversations about them" if conversations else ""
    raise PreparationFailed(
        f"{rejected} rejected, more than max_reject_fraction {config.max_reject_fraction} "
        f"({counts}; for example {example.question_id or example.clip_id}: {example.detail})"
    )


def all_rejects(plan: Plan, commits: Mapping[int, Commit]) -> list[RejectedClip]:
    """Returns the rejects of the plan and of the commits, by partition."""
    return [*plan.rejects, *(reject for i in sorted(commits) for reject in commits[i].rejects)]


def all_warnings(commits: Iterable[Commit]) -> list[ClipWarning]:
    """Returns the warnings about clips that are in the set, by partition."""
    return [warning for commit in commits for warning in commit.warnings]


def _device(config: PrepareConfig, encoder: str, commits: Sequence[Commit]) -> str:
    """Returns the kind of device that encoded a column.

    Raises:
        PreparationFailed: there are several kinds, and the config does not allow it.
    """
    devices = sorted({str(commit.columns[encoder].device) for commit in commits})
    if len(devices) > 1 and not config.mixed_devices:
        raise PreparationFailed(
            f"features of {encoder} come from several kinds of devices ({', '.join(devices)}); prepare them on one, "
            "or set mixed_devices: true"
        )
    return " + ".join(devices)
