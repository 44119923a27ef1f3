"""`pal prepare`: manifest -> features -> MDS shards. Plans the feature set, extracts its partitions and finishes it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.encoders.build import describe_encoder
from data_prep.job.commits import (
    REJECTS,
    WARNINGS,
    Commit,
    PartitionProgress,
    RejectedClip,
    column_names,
    read_commit,
    remove_commit,
    remove_uncommitted,
)
from data_prep.job.errors import PreparationFailed
from data_prep.job.finish import all_rejects, all_warnings, check_rejects, finish_feature_set
from data_prep.job.partitions import (
    Plan,
    check_rows,
    load_plan,
    make_plan,
    plan_settings,
    read_partition_clips,
    require_same_settings,
)
from data_prep.job.ray_actors import ActorPool, ray_cluster
from data_prep.job.store import Store, open_store
from data_prep.manifests.clips import RejectedRow
from data_prep.manifests.reader import audio_path, audio_roots, manifest_sha256, read_clips
from pipeline.config.loading import dump_config, load_config
from pipeline.core.arguments import add_config, add_dry_run, add_json, write_results
from pipeline.core.console import logger, progress
from pipeline.core.errors import EXIT_FAILURE, run_command
from pipeline.core.feature_contract import EncoderContract

SAMPLED_CLIPS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares one feature set and returns the exit code.

    Raises:
        UserError: see `prepare`.
    """
    parser = argparse.ArgumentParser(
        prog="pal prepare",
        description="Extract features partition by partition and finalize the set. Rerun the same command to resume.",
    )
    add_config(parser)
    add_json(parser)
    add_dry_run(parser, "print the resolved config and the expected size")
    parser.add_argument("--retry-rejects", action="store_true", help="retry rejected clips (re-runs their partitions)")
    args = parser.parse_intermixed_args(argv)
    config = load_config(PrepareConfig, args.config, args.overrides)
    if args.dry_run:
        print(dump_config(config), end="")
    try:
        results = prepare(config, dry_run=args.dry_run, retry_rejects=args.retry_rejects)
    except PreparationFailed as error:
        logger.error(f"{config.output}: {error}")
        return EXIT_FAILURE
    print(json.dumps(results, indent=2))
    write_results(results, args.json)
    return 0


def prepare(config: PrepareConfig, dry_run: bool = False, retry_rejects: bool = False) -> dict[str, Any]:
    """Creates, resumes or extends one feature set; only what is not committed is computed.

    Returns:
        clips, written, rejected, questions, audio_hours, wall_s, work_s (without the start of the workers),
        clips_per_s (of this run), bytes and fingerprint; or the estimate of a dry run.

    Raises:
        UserError: the config or manifest is invalid, or the output folder holds a set with other settings.
        PreparationFailed: too many clips are rejected, or workers cannot run.
    """
    start, work_s = time.monotonic(), 0.0
    contracts = {name: describe_encoder(encoder) for name, encoder in config.encoders.items()}
    settings = plan_settings(config, contracts)
    store = open_store(config.output)
    plan = load_plan(store)
    if plan is not None:
        require_same_settings(plan, settings, config.output)
    if dry_run:
        roots = audio_roots(config)
        paths: list[str] = []
        rejects: list[RejectedRow] = []
        clips = 0
        for row in read_clips(config):
            if isinstance(row, RejectedRow):
                rejects.append(row)
                continue
            clips += 1
            paths += [audio_path(row, roots)] if row.audio is not None else []
        check_rows(config, rejects, clips)
        return estimate(paths, len(paths), contracts)
    with store.lock():
        if plan is None or plan.manifest_sha256 != manifest_sha256(config) or plan.settings != settings:
            plan = make_plan(config, settings, store, plan)
        commits = _read_commits(store, plan, retry_rejects)
        done = {i: commit for i, commit in commits.items() if is_complete(commit, plan, contracts)}
        clips_at_start = _clips_done(done)
        open_partitions = [partition for partition in range(len(plan.partitions)) if partition not in done]
        if open_partitions:
            expected = estimate(_sampled_paths(config, plan, store), plan.clips, contracts)
            logger.info(
                f"{plan.clips} clips, about {expected['audio_hours']:.2f} hours of audio, "
                f"about {expected['bytes'] / 1e9:.2f} GB of features in {config.output}"
            )
            remove_uncommitted(store, column_names(contracts), commits.values(), keep_indexed=True)
            load = any(set(contracts) - (commits[i].columns.keys() if i in commits else set()) for i in open_partitions)
            work_s = _extract(ActorPool(config, contracts, plan, load), config, plan, done, open_partitions)
        contract = finish_feature_set(config, contracts, plan, [done[i] for i in range(len(plan.partitions))], store)
    _report_left_out(config, store, done)
    wall_s = time.monotonic() - start
    return {
        "clips": plan.clips,
        "written": contract.clips,
        "rejected": contract.rejected,
        "questions": contract.questions,
        "audio_hours": contract.audio_hours,
        "wall_s": wall_s,
        "work_s": work_s,
        "clips_per_s": (_clips_done(done) - clips_at_start) / wall_s,
        "bytes": sum(commit.bytes for commit in done.values()),
        "fingerprint": contract.fingerprint,
    }


def _read_commits(store: Store, plan: Plan, retry_rejects: bool) -> dict[int, Commit]:
    """Returns the committed partitions; with `retry_rejects` first revokes the commits of those with rejects."""
    commits = {}
    for partition, planned in enumerate(plan.partitions):
        commit = read_commit(store, partition)
        if commit is not None and retry_rejects and commit.rejects:
            remove_commit(store, partition)
        elif commit is not None and commit.audio_sha256 == planned.audio_sha256:
            commits[partition] = commit
    return commits


def is_complete(commit: Commit, plan: Plan, contracts: dict[str, EncoderContract]) -> bool:
    """Returns whether a partition has all columns and the current questions."""
    rows_sha256 = plan.partitions[commit.partition].rows_sha256
    return commit.rows_sha256 == rows_sha256 and set(commit.columns) == set(column_names(contracts))


def estimate(paths: Sequence[str], clips: int, contracts: dict[str, EncoderContract]) -> dict[str, Any]:
    """Estimates audio hours and feature bytes of a number of clips from the headers of some of their files."""
    from data_prep.audio.decode import AudioFile, Reject

    durations = []
    for path in paths[:: max(1, len(paths) // SAMPLED_CLIPS)]:
        with contextlib.suppress(Reject), AudioFile(path, None) as file:  # rejects are reported by the extraction
            durations.append(file.duration_s)
    audio_s = clips * sum(durations) / max(1, len(durations))
    frame_bytes_per_s = sum(2 * contract.width * contract.frame_rate_hz for contract in contracts.values())
    return {"clips": clips, "audio_hours": audio_s / 3600, "bytes": round(audio_s * frame_bytes_per_s)}


def _sampled_paths(config: PrepareConfig, plan: Plan, store: Store) -> list[str]:
    """Returns the audio paths of some partitions, evenly spaced over the plan."""
    roots = audio_roots(config)
    every = max(1, len(plan.partitions) // 8)
    return [
        audio_path(clip, roots)
        for partition in range(0, len(plan.partitions), every)
        for clip in read_partition_clips(store, partition)
        if clip.audio is not None
    ]


def _extract(
    pool: ActorPool, config: PrepareConfig, plan: Plan, commits: dict[int, Commit], open_partitions: list[int]
) -> float:
    """Extracts the open partitions and adds their records to `commits`; returns the seconds that workers worked."""
    start = time.monotonic()
    clips_at_start = _clips_done(commits)
    audio_s_at_start = sum(commit.audio_s for commit in commits.values())

    def on_commit(commit: Commit) -> None:
        commits[commit.partition] = commit
        check_rejects(config, plan, commits)

    def on_progress(in_progress: Mapping[int, PartitionProgress], workers: int) -> None:
        elapsed_s = max(time.monotonic() - start, 1e-9)
        clips = _clips_done(commits) + sum(partition.position for partition in in_progress.values())
        audio_s = sum(commit.audio_s for commit in commits.values()) - audio_s_at_start
        audio_s += sum(partition.audio_s for partition in in_progress.values())
        rejects = len(all_rejects(plan, commits)) + sum(partition.rejected for partition in in_progress.values())
        note = (
            f"{(clips - clips_at_start) / elapsed_s:.1f} clips/s, {audio_s / 3600 / elapsed_s:.3g} audio-hours/s, "
            f"{rejects} rejected, {workers} worker{'s' if workers != 1 else ''}"
        )
        shown.update(clips + len(plan.rejects), note, force=len(commits) == len(plan.partitions))

    with progress(plan.clips, "clips", clips_at_start + len(plan.rejects)) as shown, ray_cluster():
        return pool.run(open_partitions, on_commit, on_progress)


def _report_left_out(config: PrepareConfig, store: Store, commits: Mapping[int, Commit]) -> None:
    """Logs how many clips and conversations were rejected or have a warning, by reason, if there are any."""
    rejects = [RejectedClip.model_validate_json(line) for line in store.read(REJECTS).splitlines()]
    for name, reasons in (
        (REJECTS, [reject.reason for reject in rejects]),
        (WARNINGS, [warning.warning for warning in all_warnings(commits.values())]),
    ):
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in collections.Counter(reasons).most_common())
            entries = "entry" if len(reasons) == 1 else "entries"
            logger.warning(f"{config.output}/{name} has {len(reasons)} {entries}: {counts}")


def _clips_done(commits: Mapping[int, Commit]) -> int:
    return sum(commit.clips + len(commit.rejects) for commit in commits.values())


if __name__ == "__main__":
    sys.exit(run_command(main))
