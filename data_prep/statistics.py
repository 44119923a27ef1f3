"""Statistics of a feature set, collected by validation and drawn by the plots."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Statistics of the clips and questions of a feature set.

    Attributes:
        durations_s: duration of each clip.
        questions: number of questions of each clip.
        domains: number of clips by domain.
        tasks: number of questions by task.
        rejects: number of rejected clips by reason.
        norms: root mean square of each clip's features, by encoder.
    """

    durations_s: list[float] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    domains: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    norms: dict[str, list[float]] = field(default_factory=dict)
