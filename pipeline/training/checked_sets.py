"""The feature sets of a run with every selected question checked: those that cannot be trained on are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoConfig

from pipeline.config import ExperimentConfig
from pipeline.core.console import logger
from pipeline.core.files import atomic_write
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.feature_set import FeatureSet, open_feature_set, open_mixture
from pipeline.data.question_check import AudioPositions, CheckedSelection, QuestionChecker, Selection

UNFIT = "unfit.jsonl"  # questions of a run that are left out, one per line


@dataclass(frozen=True)
class CheckedSets:
    """The feature sets of a run after the check of their questions.

    Attributes:
        train, validation: sets of `data.train` and `data.validation`.
        mixture: set of each entry of `data.mixture`.
        checks: what the check of each selection found.
    """

    train: FeatureSet
    validation: FeatureSet | None
    mixture: Sequence[FeatureSet]
    checks: Sequence[CheckedSelection]

    @property
    def num_unfit(self) -> int:
        """Number of questions that are left out."""
        return sum(len(check.unfit) for check in self.checks)

    def report(self, output: Path | None = None) -> None:
        """Logs one line for each selection with unfit questions.

        Args:
            output: folder where `write_list` lists them; None in a dry run.
        """
        listed = "" if output is None else f" (listed in {output / UNFIT})"
        for check in self.checks:
            if check.unfit:
                logger.warning(f"{check.report()}{listed}")

    def write_list(self, output: Path) -> None:
        """Writes the unfit questions to `unfit.jsonl` of an output folder; removes the file if there are none."""
        lines = [json.dumps(asdict(question)) + "\n" for check in self.checks for question in check.unfit]
        if lines:
            output.mkdir(parents=True, exist_ok=True)
            atomic_write(output / UNFIT, "".join(lines).encode())
        else:
            (output / UNFIT).unlink(missing_ok=True)


def open_checked_sets(
    config: ExperimentConfig, chat_template: ChatTemplate, audio_positions: AudioPositions
) -> CheckedSets:
    """Opens every feature set of a run and checks all selected questions, which takes time at the first start alone.

    Args:
        audio_positions: duration of a clip in seconds -> positions of its audio.

    Raises:
        UserError: a set cannot be read, or has unfit questions that may not be left out (see `QuestionChecker`).
    """
    data, encoders = config.data, config.model.encoders
    train = open_feature_set(data.train, encoders, data)
    validation = open_feature_set(data.validation, encoders, data) if data.validation else None
    mixture = open_mixture(train, data)
    max_positions = getattr(AutoConfig.from_pretrained(config.model.language_model), "max_position_embeddings", None)
    checker = QuestionChecker(chat_template, data, max_positions, audio_positions)
    checks = [checker.check(train, Selection("data.train", data.tasks, data.datasets))]
    if validation is not None:
        checks.append(checker.check(validation, Selection("data.validation", data.tasks, data.datasets)))
    for number, (mixed_set, mixed) in enumerate(zip(mixture, data.mixture, strict=True)):
        checks.append(checker.check(mixed_set, Selection(f"data.mixture.{number}", mixed.tasks, mixed.datasets)))
    return CheckedSets(train, validation, mixture, checks)
