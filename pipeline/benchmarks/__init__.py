"""Published benchmarks as their authors lay them out: questions, prompts, verdicts, prediction files."""

from pipeline.benchmarks.base import Benchmark, Item
from pipeline.benchmarks.classification import Esc50, Gtzan
from pipeline.benchmarks.librispeech import LibriSpeech
from pipeline.benchmarks.mmsu import Mmsu
from pipeline.benchmarks.string_match import Mmar, Mmau

BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in (Mmau, Mmar, Mmsu, Esc50, Gtzan, LibriSpeech)}

__all__ = ["BENCHMARKS", "Benchmark", "Esc50", "Gtzan", "Item", "LibriSpeech", "Mmar", "Mmau", "Mmsu"]
