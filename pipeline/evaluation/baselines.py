"""Controls of an evaluation: the same questions with other clips' audio, and answers that use no audio."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.scoring import MajorityBaseline

SWAP_SEED = 0


def swap_within_domains(domains: Mapping[int, str]) -> dict[int, int]:
    """Pairs each clip with the audio of another clip: a random permutation with a fixed seed.

    Audio is swapped within a domain, which is the stricter control: with audio of another domain the questions make no
    sense and accuracy falls for that reason alone, while here the audio is plausible and only the clip is wrong. Clips
    that are alone in their domain swap among themselves.

    Args:
        domains: clip -> domain.

    Returns:
        clip -> the clip whose audio replaces its own; never itself.

    Raises:
        UserError: fewer than two clips.
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
    return {clip: cycle[index - 1] for cycle in cycles for index, clip in enumerate(cycle)}


def majority_baseline(features: FeatureSet) -> MajorityBaseline:
    """Returns the majority baseline of a training set; see `scoring.MajorityBaseline`."""
    questions = (question for clip in range(len(features)) for question in features.clip(clip).questions)
    return MajorityBaseline((question.task, question.question, question.answer) for question in questions)
