"""Controls of an evaluation: the same questions with other clips' audio, and answers that use no audio."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.benchmark_clips import BenchmarkClips
from pipeline.evaluation.scoring import MajorityBaseline

SWAP_SEED = 0
SAMPLED_FRAMES, SAMPLED_WIDTH = 16, 32
SAMPLE_TOLERANCE = (
    0.1  # of the variation: a lossless copy may differ in the last bit of its samples, other sounds by 0.4
)

AreCopies = Callable[[int, int], bool]


def swap_audio(question_set: FeatureSet | BenchmarkClips, clips: Sequence[int]) -> dict[int, int]:
    """Pairs each of these clips with another one of its domain that holds another sound; see `swap_within_domains`.

    Reads (or encodes) the audio of clips of equal duration, since copies of a sound may have different ids.

    Raises:
        UserError: fewer than two clips, or nothing but copies of one sound.
    """
    durations = Counter(round(float(question_set.table.duration_s[clip]), 3) for clip in clips)
    samples = {
        clip: _sample_features(question_set.features(clip, question_set.clip(clip).clip_id))
        for clip in clips
        if durations[round(float(question_set.table.duration_s[clip]), 3)] > 1
    }

    def are_copies(clip: int, other: int) -> bool:
        same_duration = clip in samples and other in samples
        return clip == other or (same_duration and _are_equal(samples[clip], samples[other]))

    return swap_within_domains({clip: question_set.clip(clip).domain for clip in clips}, are_copies)


def swap_within_domains(domains: Mapping[int, str], are_copies: AreCopies | None = None) -> dict[int, int]:
    """Pairs each clip with the audio of another clip: a random permutation with a fixed seed.

    Audio is swapped within a domain, which is the stricter control: with audio of another domain the questions make no
    sense and accuracy falls for that reason alone, while here the audio is plausible and only the clip is wrong. Clips
    that are alone in their domain swap among themselves. A clip whose partner is a copy of it exchanges partners with
    another clip; where that is impossible, it shares the audio of a third one.

    Args:
        domains: clip -> domain.
        are_copies: whether two clips hold the same sound, as a clip and itself do; None if no two clips do.

    Returns:
        clip -> the clip whose audio replaces its own; never itself or a copy.

    Raises:
        UserError: fewer than two clips, or nothing but copies of one sound.
    """
    if len(domains) < 2:
        raise UserError("--swap-audio", "needs at least two clips", "evaluate more clips")
    groups: dict[str, list[int]] = defaultdict(list)
    for clip in sorted(domains):
        groups[domains[clip]].append(clip)
    rng = np.random.default_rng(SWAP_SEED)
    cycles = [rng.permutation(groups[domain]).tolist() for domain in sorted(groups) if len(groups[domain]) > 1]
    singletons = [clip for members in groups.values() if len(members) == 1 for clip in members]
    if len(singletons) == 1:
        cycles[0] += singletons
    elif singletons:
        cycles.append(singletons)
    pairing = {clip: cycle[index - 1] for cycle in cycles for index, clip in enumerate(cycle)}
    if are_copies is not None:
        for clip in sorted(pairing):
            if are_copies(clip, pairing[clip]):
                _replace_partner(clip, pairing, groups[domains[clip]], are_copies)
    return pairing


def _replace_partner(clip: int, pairing: dict[int, int], domain: Sequence[int], are_copies: AreCopies) -> None:
    """Replaces the partner of a clip by one that is no copy of it, out of the clips of its domain if these hold any."""
    neighbours = [other for other in domain if not are_copies(clip, other)]
    for other in neighbours:
        partner = pairing[other]
        if not are_copies(clip, partner) and not are_copies(other, pairing[clip]):
            pairing[clip], pairing[other] = partner, pairing[clip]
            return
    others = neighbours or [other for other in sorted(pairing) if not are_copies(clip, other)]
    if others:
        pairing[clip] = others[clip % len(others)]
        return
    fault = f"has no effect: all {len(pairing)} clips are copies of one sound, so no clip has other audio"
    raise UserError("--swap-audio", fault, "evaluate clips of different sounds, or leave --swap-audio out")


def _sample_features(features: Mapping[str, NDArray[np.float16]]) -> list[tuple[int, NDArray[np.float32]]]:
    """Returns, of each encoder, the number of frames and some values of some frames, by which sounds are compared."""
    samples = []
    for _, frames in sorted(features.items()):
        rows = np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).round().astype(np.int64)
        columns = np.linspace(0, frames.shape[1] - 1, SAMPLED_WIDTH).round().astype(np.int64)
        samples.append((len(frames), frames[np.ix_(rows, columns)].astype(np.float32)))
    return samples


def _are_equal(
    sample: Sequence[tuple[int, NDArray[np.float32]]], other: Sequence[tuple[int, NDArray[np.float32]]]
) -> bool:
    """Returns whether two samples agree up to the noise of encoding a sound again, from another file or in a batch."""
    for (frames, values), (other_frames, other_values) in zip(sample, other, strict=True):
        if frames != other_frames:
            return False
        if np.linalg.norm(values - other_values) > SAMPLE_TOLERANCE * np.linalg.norm(values - values.mean()):
            return False
    return True


def majority_baseline(features: FeatureSet) -> MajorityBaseline:
    """Returns the majority baseline of a training set; see `scoring.MajorityBaseline`."""
    questions = (question for clip in range(len(features)) for question in features.clip(clip).questions)
    return MajorityBaseline((question.task, question.question, question.answer) for question in questions)
