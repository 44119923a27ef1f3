"""`pal prepare`: manifest -> features -> MDS shards. Plans, lets the cluster work, and finishes the set."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.encoders.build import describe_encoder
from data_prep.job.commits import (
    INDEX,
    REJECTS,
    Commit,
    RejectedClip,
    column_names,
    merged_index,
    read_commit,
    remove_commit,
    sweep,
)
from data_prep.job.partitions import (
    Plan,
    load_plan,
    make_plan,
    missing_audio,
    read_partition_clips,
    require_same_settings,
    settings_of,
)
from data_prep.job.progress import ProgressLine
from data_prep.job.ray_actors import Cluster, PreparationFailed, ray_cluster
from data_prep.job.store import SCRATCH, Store, open_store
from data_prep.manifests.manifest import audio_path, audio_roots, manifest_sha256, read_clips
from pipeline.config.loading import dump_config, load_config
from pipeline.core.errors import EXIT_FAILURE, run_command
from pipeline.core.feature_contract import CONTRACT_FILE, EncoderContract, FeatureContract

CONFIG_FILE = "prepare.yaml"
SAMPLED_CLIPS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; user mistakes leave as UserError."""
    parser = argparse.ArgumentParser(prog="pal prepare", description=__doc__)
    parser.add_argument("config", help="YAML file (data_prep/config.py: PrepareConfig)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the run")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the expected size")
    parser.add_argument("--retry-rejects", action="store_true", help="do partitions with rejected clips once more")
    args = parser.parse_intermixed_args(argv)
    config = load_config(PrepareConfig, args.config, args.overrides)
    if args.dry_run:
        sys.stdout.write(dump_config(config))
    try:
        figures = prepare(config, dry_run=args.dry_run, retry_rejects=args.retry_rejects)
    except PreparationFailed as error:
        sys.stderr.write(f"{config.output}: {error}\n")
        return EXIT_FAILURE
    text = json.dumps(figures, indent=2) + "\n"
    sys.stdout.write(text)
    if args.json is not None:
        args.json.write_text(text, encoding="utf-8")
    return 0


def prepare(config: PrepareConfig, dry_run: bool = False, retry_rejects: bool = False) -> dict[str, Any]:
    """Makes (or goes on making, or lets grow) one feature set; only what is not committed is worked on.

    Returns:
        clips, written, rejected, audio_hours, wall_s, work_s (without the start of the
        workers), clips_per_s (of this run), bytes, fingerprint; or the estimate
        of a dry run.

    Raises:
        UserError: a fault of the config or manifest, an output folder of other settings.
        PreparationFailed: too many rejects, or workers that cannot work.
    """
    start, work_s = time.monotonic(), 0.0
    contracts = {name: describe_encoder(encoder) for name, encoder in config.encoders.items()}
    settings = settings_of(config, contracts)
    store = open_store(config.output)
    plan = load_plan(store)
    if plan is not None:
        require_same_settings(plan, settings, config.output)
    if dry_run:
        roots = audio_roots(config)
        paths = [audio_path(clip, roots) for clip in read_clips(config) if clip.audio is not None]
        return estimate(paths, len(paths), contracts)
    with store.lock():
        if plan is None or plan.manifest_sha256 != manifest_sha256(config) or plan.settings != settings:
            plan = make_plan(config, settings, store, plan)
        commits = _read_commits(store, plan, retry_rejects)
        done = {i: commit for i, commit in commits.items() if is_complete(commit, plan, contracts)}
        before = _clips_done(done)
        open_partitions = [partition for partition in range(len(plan.partitions)) if partition not in done]
        if open_partitions:
            expected = estimate(_sampled_paths(config, plan, store), plan.clips, contracts)
            sys.stderr.write(
                f"{plan.clips} clips, about {expected['audio_hours']:.2f} hours of audio, "
                f"about {expected['bytes'] / 1e9:.2f} GB of features in {config.output}\n"
            )
            sweep(store, column_names(contracts), commits.values(), keep_indexed=True)
            load = any(set(contracts) - (commits[i].columns.keys() if i in commits else set()) for i in open_partitions)
            work_s = _extract(config, contracts, plan, done, open_partitions, load)
        contract = finish(config, contracts, plan, [done[i] for i in range(len(plan.partitions))], store)
    wall_s = time.monotonic() - start
    return {
        "clips": plan.clips,
        "written": contract.clips,
        "rejected": contract.rejected,
        "questions": contract.questions,
        "audio_hours": contract.audio_hours,
        "wall_s": wall_s,
        "work_s": work_s,
        "clips_per_s": (_clips_done(done) - before) / wall_s,
        "bytes": sum(commit.bytes for commit in done.values()),
        "fingerprint": contract.fingerprint,
    }


def _read_commits(store: Store, plan: Plan, retry_rejects: bool) -> dict[int, Commit]:
    """The committed partitions; with `retry_rejects` those with rejects are given up first."""
    commits = {}
    for partition, planned in enumerate(plan.partitions):
        commit = read_commit(store, partition)
        if commit is not None and retry_rejects and commit.rejects:
            remove_commit(store, partition)
        elif commit is not None and commit.audio_sha256 == planned.audio_sha256:
            commits[partition] = commit
    return commits


def is_complete(commit: Commit, plan: Plan, contracts: dict[str, EncoderContract]) -> bool:
    rows_sha256 = plan.partitions[commit.partition].rows_sha256
    return commit.rows_sha256 == rows_sha256 and set(commit.columns) == set(column_names(contracts))


def estimate(paths: Sequence[str], clips: int, contracts: dict[str, EncoderContract]) -> dict[str, Any]:
    """Audio hours and bytes of features to expect of so many clips, from the headers of some of their files."""
    from data_prep.audio.decode import AudioFile, Reject

    durations = []
    for path in paths[:: max(1, len(paths) // SAMPLED_CLIPS)]:
        with contextlib.suppress(Reject), AudioFile(path, None) as file:  # rejects are told when their turn comes
            durations.append(file.duration_s)
    audio_s = clips * sum(durations) / max(1, len(durations))
    frame_bytes_per_s = sum(2 * contract.width * contract.frame_rate_hz for contract in contracts.values())
    return {"clips": clips, "audio_hours": audio_s / 3600, "bytes": round(audio_s * frame_bytes_per_s)}


def _sampled_paths(config: PrepareConfig, plan: Plan, store: Store) -> list[str]:
    """The audio of some partitions, from all over the plan."""
    roots = audio_roots(config)
    every = max(1, len(plan.partitions) // 8)
    return [
        audio_path(clip, roots)
        for partition in range(0, len(plan.partitions), every)
        for clip in read_partition_clips(store, partition)
        if clip.audio is not None
    ]


def _extract(
    config: PrepareConfig,
    contracts: dict[str, EncoderContract],
    plan: Plan,
    commits: dict[int, Commit],
    open_partitions: list[int],
    load_encoders: bool,
) -> float:
    """Does the partitions of `open_partitions` and adds them to `commits`; the seconds that workers were at work."""
    line = ProgressLine(plan.clips, _clips_done(commits) + len(plan.rejects))
    audio_before = sum(commit.audio_s for commit in commits.values())

    def on_commit(commit: Commit) -> None:
        commits[commit.partition] = commit
        _check_rejects(config, plan, commits)

    def on_progress(under_work: dict[int, Any], workers: int) -> None:
        line.update(
            clips=_clips_done(commits) + len(plan.rejects) + sum(p.position for p in under_work.values()),
            audio_s=sum(c.audio_s for c in commits.values())
            - audio_before
            + sum(p.audio_s for p in under_work.values()),
            rejects=len(_rejects(plan, commits)) + sum(p.rejected for p in under_work.values()),
            workers=workers,
            force=len(commits) == len(plan.partitions),
        )

    try:
        with ray_cluster():
            return Cluster(config, contracts, plan, load_encoders).run(open_partitions, on_commit, on_progress)
    finally:
        line.close()


def finish(
    config: PrepareConfig,
    contracts: dict[str, EncoderContract],
    plan: Plan,
    commits: list[Commit],
    store: Store,
) -> FeatureContract:
    """Writes the merged indexes, the rejects, the config and, last, the contract that makes it a feature set."""
    rejects = _check_rejects(config, plan, {commit.partition: commit for commit in commits})
    columns = column_names(contracts)
    contract = FeatureContract(
        encoders={
            name: contract.model_copy(
                update={"software": {**contract.software, "device": _device(config, name, commits)}}
            )
            for name, contract in contracts.items()
        },
        clips=sum(commit.clips for commit in commits),
        questions=sum(commit.questions for commit in commits),
        rejected=len(rejects),
        audio_hours=sum(commit.audio_s for commit in commits) / 3600,
        manifest_sha256=plan.manifest_sha256,
    )
    files = {f"{column}/{INDEX}": merged_index(store, column, commits) for column in columns}
    files[REJECTS] = "".join(reject.model_dump_json() + "\n" for reject in rejects).encode()
    files[CONFIG_FILE] = dump_config(config).encode()
    files[CONTRACT_FILE] = contract.dump().encode()
    if any(store.size(name) != len(data) or store.read(name) != data for name, data in files.items()):
        store.remove(CONTRACT_FILE)  # no reader may see new indexes under an old contract
        for name, data in files.items():
            store.write(name, data)
    sweep(store, columns, commits, keep_indexed=False)
    store.remove(SCRATCH)
    return contract


def _device(config: PrepareConfig, encoder: str, commits: Sequence[Commit]) -> str:
    """The kind of device that made a column.

    Raises:
        PreparationFailed: several kinds, and the config does not allow it.
    """
    devices = sorted({str(commit.columns[encoder].device) for commit in commits})
    if len(devices) > 1 and not config.mixed_devices:
        raise PreparationFailed(
            f"features of {encoder} come from several kinds of devices ({', '.join(devices)}); prepare them on one, "
            "or set mixed_devices: true"
        )
    return " + ".join(devices)


def _check_rejects(config: PrepareConfig, plan: Plan, commits: dict[int, Commit]) -> list[RejectedClip]:
    """All rejects so far.

    Raises:
        UserError: too many, mostly because files do not exist.
        PreparationFailed: too many for other reasons.
    """
    rejects = _rejects(plan, commits)
    if len(rejects) <= config.max_reject_fraction * plan.clips:
        return rejects
    reasons = collections.Counter(reject.reason for reject in rejects).most_common(3)
    example = next(reject for reject in rejects if reject.reason == reasons[0][0])
    if reasons[0][0] == "missing":
        raise missing_audio(", ".join(config.manifests), reasons[0][1], plan.clips, str(example.audio))
    told = ", ".join(f"{count} {reason}" for reason, count in reasons)
    raise PreparationFailed(
        f"{len(rejects)} of {plan.clips} clips rejected, more than max_reject_fraction {config.max_reject_fraction} "
        f"({told}; for example {example.clip_id}: {example.detail})"
    )


def _rejects(plan: Plan, commits: dict[int, Commit]) -> list[RejectedClip]:
    return [*plan.rejects, *(reject for i in sorted(commits) for reject in commits[i].rejects)]


def _clips_done(commits: dict[int, Commit]) -> int:
    return sum(commit.clips + len(commit.rejects) for commit in commits.values())


if __name__ == "__main__":
    sys.exit(run_command(main))
