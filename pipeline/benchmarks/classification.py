"""Closed classification as LTU asks it (arXiv 2305.10790, section 5): a free answer, which must name the right class.

LTU compares embeddings of answer and labels; here the answer must name one class (`chosen`), so that no second model
judges. The scores are therefore lower bounds of LTU's."""

from __future__ import annotations

import csv

from pipeline.benchmarks.base import Benchmark, Item
from pipeline.benchmarks.multiple_choice import chosen
from pipeline.errors import UserError


class _Classification(Benchmark):
    domain: str
    question: str

    def correct(self, item: Item, prediction: str) -> bool:
        """Whether the answer names the right class and no other."""
        number = chosen(prediction, item.choices)
        return number is not None and item.choices[number] == item.answer

    def _items(self, files: dict[str, str]) -> list[Item]:
        """Items of audio files (relative to the benchmark's folder) and their labels."""
        choices = tuple(sorted(set(files.values())))
        prompt = f"{self.question}\nAnswer with one of these, word for word: {', '.join(choices)}."
        root = self.file if self.file.is_dir() else self.file.parent.parent
        return [
            Item(file, root / file, prompt, label, choices, self.domain, self.name, {"file": file, "label": label})
            for file, label in files.items()
        ]


class Esc50(_Classification):
    """ESC-50: `meta/esc50.csv` (filename, category, ...) and `audio/`. All five folds: nothing was trained on them."""

    name = "esc50"
    files = ("meta/esc50.csv",)
    domain = "sound"
    question = "Which sound is this?"

    def _read(self) -> list[Item]:
        with self.file.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"filename", "category"} <= rows[0].keys():
            raise UserError(self.file, "has no columns filename and category", "give ESC-50 as it is published")
        return self._items({f"audio/{row['filename']}": row["category"].replace("_", " ") for row in rows})


class Gtzan(_Classification):
    """GTZAN: `genres_original/<genre>/*.wav` (or `genres/`)."""

    name = "gtzan"
    files = ("genres_original", "genres")
    domain = "music"
    question = "Which genre is this music?"

    def _read(self) -> list[Item]:
        paths = sorted(path for path in self.file.glob("*/*") if path.suffix in (".wav", ".au"))
        return self._items({str(path.relative_to(self.file)): path.parent.name for path in paths})
