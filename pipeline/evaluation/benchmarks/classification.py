"""Classification as in LTU (arXiv 2305.10790, section 5): a free-form answer that must name the right classes.

LTU compares embeddings of answer and labels. Here the answer must name the classes word for word, so that no second
model is needed; the scores are therefore lower bounds of LTU's."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.core.class_names import class_key, class_text, named
from pipeline.core.errors import UserError
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_table, read_text


class _Classification(Benchmark):
    """A benchmark with one class per file, which is named word for word: letters are not offered."""

    domain = "sound"
    question: str
    instruction = "Answer with one of these, word for word"

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether the answer names all classes of the file and no other."""
        return {item.choices[number] for number in named(prediction, item.choices)} == set(item.row["labels"])

    def _items(self, root: Path, labels: Iterable[tuple[str, Sequence[str]]]) -> list[Item]:
        """Returns the items of audio files (relative to `root`) and the published names of their classes.

        Raises:
            UserError: a name that is empty, or a file that is listed with different classes.
        """
        texts: dict[str, str] = {}  # key of a class -> its text
        classes: dict[str, list[str]] = {}  # file -> keys
        for file, names in labels:
            keys = list(dict.fromkeys(map(class_key, names)))
            if not all(keys) or not keys:
                raise UserError(self.file, f"gives {file} a class without a name", "download the file again")
            if classes.setdefault(file, keys) != keys:
                raise UserError(self.file, f"lists {file} twice, with different classes", "remove one of the rows")
            for name in names:
                texts.setdefault(class_key(name), class_text(name))
        choices = tuple(sorted(texts.values()))
        prompt = f"{self.question}\n{self.instruction}: {', '.join(choices)}."
        items = []
        for file, keys in classes.items():
            row = {"labels": [texts[key] for key in keys]}
            answer = ", ".join(row["labels"])
            items.append(Item(file, root / file, prompt, answer, choices, self.domain, self.name, row))
        return items


class _Tagging(_Classification):
    """A benchmark with any number of classes per file."""

    question = "Which sounds are in this recording?"
    instruction = "Name each that you hear, word for word, out of these"

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns `f1_micro`; and `f1_macro` and `mean_average_precision` over the classes that occur in these files.

        In the average precision of a class, files whose answer names it rank before all others.
        """
        from sklearn.metrics import average_precision_score, f1_score  # takes a second to import

        items = [item for item in self.items if item.question_id in predictions]
        labels_NC = np.array([[choice in item.row["labels"] for choice in item.choices] for item in items])
        predicted_NC = np.zeros_like(labels_NC)
        for row, item in enumerate(items):
            predicted_NC[row, sorted(named(predictions[item.question_id], item.choices))] = True
        classes = [(labels_NC[:, number], predicted_NC[:, number]) for number in np.flatnonzero(labels_NC.any(axis=0))]
        return {
            "f1_micro": float(f1_score(labels_NC.ravel(), predicted_NC.ravel(), zero_division=0.0)),
            "f1_macro": float(np.mean([f1_score(*pair, zero_division=0.0) for pair in classes])),
            "mean_average_precision": float(np.mean([average_precision_score(*pair) for pair in classes])),
        }


class Esc50(_Classification):
    """ESC-50: `meta/esc50.csv` (filename, category, ...) and `audio/`. All five folds, since none is trained on."""

    name = "esc50"
    files = ("meta/esc50.csv",)
    question = "Which sound is this?"

    def _read(self) -> list[Item]:
        rows = read_table(self.file, ["filename", "category"])
        labels = [(f"audio/{row['filename'].strip()}", [row["category"]]) for _, row in rows]
        return self._items(self.file.parent.parent, labels)


class Gtzan(_Classification):
    """GTZAN: `genres_original/<genre>/*.wav` (or `genres/`)."""

    name = "gtzan"
    files = ("genres_original", "genres")
    domain = "music"
    question = "Which genre is this music?"

    def _read(self) -> list[Item]:
        paths = sorted(path for path in self.file.glob("*/*") if path.suffix.lower() in (".wav", ".au"))
        visible = [path.relative_to(self.file) for path in paths if not path.name.startswith(".")]
        return self._items(self.file, [(str(path), [path.parent.name]) for path in visible])


class VocalSound(_Classification):
    """VocalSound's test set: `datafiles/te.json` and `audio_16k/` (else `audio_44k/`).

    The names of the files end in the class; their paths in `te.json` are those of its authors' machine.
    """

    name = "vocalsound"
    files = ("datafiles/te.json",)
    question = "Which sound does this person make?"
    classes = {"throatclearing": "throat clearing"}

    def _read(self) -> list[Item]:
        root = self.file.parent.parent
        audio = "audio_16k" if (root / "audio_16k").is_dir() else "audio_44k"
        try:
            names = [Path(row["wav"]).name for row in json.loads(read_text(self.file))["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(self.file, f"is no list of recordings ({error!r})", "download the file again") from error
        class_of = {name: Path(name).stem.rpartition("_")[2] for name in names}
        labels = [(f"{audio}/{name}", [self.classes.get(class_of[name], class_of[name])]) for name in names]
        return self._items(root, labels)


class Dcase2017(_Tagging):
    """DCASE 2017 task 4 A, evaluation set: `groundtruth_weak_label_evaluation_set.csv`, one label per line,
    and the audio.

    The names of the audio files are those in the CSV with a `Y` before them.
    """

    name = "dcase2017"
    files = ("groundtruth_weak_label_evaluation_set.csv",)
    audio = "evaluation_set_formatted_audio_segments"

    def _read(self) -> list[Item]:
        labels: dict[str, list[str]] = {}
        rows = csv.reader(io.StringIO(read_text(self.file), newline=""), delimiter="\t")
        for line, row in enumerate(rows, start=1):
            if not row:
                continue
            if len(row) != 4:
                fault = f"has {len(row)} columns instead of file, begin, end, label"
                raise UserError(f"{self.file}, line {line}", fault, "download the file again")
            labels.setdefault(f"{self.audio}/Y{row[0]}", []).append(row[3])
        return self._items(self.file.parent, labels.items())


class Fsd50k(_Tagging):
    """FSD50K's evaluation set: `FSD50K.ground_truth/eval.csv` (fname, labels, ...) and `FSD50K.eval_audio/`."""

    name = "fsd50k"
    files = ("FSD50K.ground_truth/eval.csv",)

    def _read(self) -> list[Item]:
        rows = read_table(self.file, ["fname", "labels"])
        labels = [(f"FSD50K.eval_audio/{row['fname'].strip()}.wav", row["labels"].split(",")) for _, row in rows]
        return self._items(self.file.parent.parent, labels)
