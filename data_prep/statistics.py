"""What a feature set holds, in numbers: counted by validation, drawn by the plots."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """What a set holds, for its picture.

    Attributes:
        norms: by encoder, the root mean square of each clip's features.
    """

    durations_s: list[float] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    domains: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    norms: dict[str, list[float]] = field(default_factory=dict)
