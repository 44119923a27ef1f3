"""LibriSpeech: transcripts, scored by word error rates."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.text_forms import words
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_text
from pipeline.evaluation.word_errors import plain_words, word_errors

PROMPT = "Write down what is said, word for word."


class LibriSpeech(Benchmark):
    """One part (`test-clean`, ...): `<speaker>/<chapter>/<speaker>-<chapter>.trans.txt` beside FLAC files."""

    name = "librispeech"
    files = ()
    has_transcripts = True

    def _find(self, folder: Path) -> Path:
        return folder

    def _read(self) -> list[Item]:
        items = []
        for transcript in sorted(self.file.glob("*/*/*.trans.txt")):
            if transcript.name.startswith("."):
                continue
            for number, line in enumerate(read_text(transcript).split("\n"), start=1):
                if not line.strip():
                    continue
                name, *texts = line.split(maxsplit=1)
                text = texts[0] if texts else ""
                if not words(text):
                    raise UserError(f"{transcript}:{number}", "has no transcript", "download the file again")
                audio = transcript.parent / f"{name}.flac"
                items.append(Item(name, audio, PROMPT, text.strip(), (), "speech", self.file.name, {"id": name}))
        return items

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether every word is right."""
        return word_errors(plain_words(item.answer), plain_words(prediction)) == 0
