"""Published benchmarks as their authors lay them out: questions, prompts, verdicts, prediction files."""

from pipeline.benchmarks.mmsu import Mmsu
from pipeline.benchmarks.multiple_choice import Item, MultipleChoice
from pipeline.benchmarks.string_match import Mmar, Mmau

BENCHMARKS: dict[str, type[MultipleChoice]] = {kind.name: kind for kind in (Mmau, Mmar, Mmsu)}

__all__ = ["BENCHMARKS", "Item", "Mmar", "Mmau", "Mmsu", "MultipleChoice"]
