"""Published benchmarks in their own layouts: questions, prompts, scoring rules, prediction files."""

from pipeline.evaluation.benchmarks.base import Benchmark, Item
from pipeline.evaluation.benchmarks.captions import AudioCaps, Clotho
from pipeline.evaluation.benchmarks.classification import Dcase2017, Esc50, Fsd50k, Gtzan, VocalSound
from pipeline.evaluation.benchmarks.librispeech import LibriSpeech
from pipeline.evaluation.benchmarks.mmsu import Mmsu
from pipeline.evaluation.benchmarks.string_match import Mmar, Mmau

_KINDS = (Mmau, Mmar, Mmsu, Esc50, Dcase2017, VocalSound, Fsd50k, Gtzan, AudioCaps, Clotho, LibriSpeech)
BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in _KINDS}

__all__ = [
    "BENCHMARKS",
    "AudioCaps",
    "Benchmark",
    "Clotho",
    "Dcase2017",
    "Esc50",
    "Fsd50k",
    "Gtzan",
    "Item",
    "LibriSpeech",
    "Mmar",
    "Mmau",
    "Mmsu",
    "VocalSound",
]
