"""What an evaluation is compared with: answers about other clips' audio, and those that need no audio."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.feature_set import FeatureSet
from pipeline.evaluation.scoring import MajorityBaseline

SWAP_SEED = 0


def swap_within_domains(domains: Mapping[int, str]) -> dict[int, int]:
    """Gives each clip another clip's audio, at random but always the same.

    Within a domain, since that is the stricter control: audio of a foreign domain would make the questions absurd and
    the score fall for that reason alone, while here the model hears something plausible and only the clip is wrong.
    Clips that are alone in their domain swap among themselves.

    Args:
        domains: clip -> domain.

    Returns:
        clip -> the clip heard instead: never itself.

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
    alone = [clip for members in groups.values() if len(members) == 1 for clip in members]
    if len(alone) == 1:
        cycles[0] += alone
    elif alone:
        cycles.append(alone)
    return {clip: cycle[place - 1] for cycle in cycles for place, clip in enumerate(cycle)}


def majority_baseline(features: FeatureSet) -> MajorityBaseline:
    """The answers of a training set, counted; see `scoring.MajorityBaseline`."""
    questions = (question for clip in range(len(features)) for question in features.clip(clip).questions)
    return MajorityBaseline((question.task, question.question, question.answer) for question in questions)
