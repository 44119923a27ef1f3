"""Captioning: AudioCaps (NAACL 2019) and Clotho (arXiv 1910.09387), scored by CIDEr of pycocoevalcap.

The prompts are this project's and name the style, as LTU's do. Predictions are written in the format of DCASE's
captioning tasks."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.text_forms import words
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_table

# In order of preference, where a clip has several files; whatever a downloader leaves beside them is no audio.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".webm")
# A YouTube id, alone or before a separator: the id may contain separators itself.
_CLIP_NAME = "(?P<id>[\\w-]{11})(?:[^A-Za-z0-9-].*)?"


class _Captions(Benchmark):
    """A captioning benchmark; needs pycocoevalcap (the extra `captions`)."""

    prompt: str
    caveat = "spice, spider and fense need Java or downloaded models; their tools read the CSV of the predictions"

    def __init__(self, location: Path) -> None:
        try:
            import pycocoevalcap.cider.cider  # noqa: F401
        except ImportError as error:
            raise UserError(self.name, "needs pycocoevalcap", "pip install 'pal-pipeline[captions]'") from error
        super().__init__(location)

    def _item(self, audio: Path, captions: list[str]) -> Item:
        row = {"file_name": audio.name, "captions": captions}
        return Item(audio.name, audio, self.prompt, captions[0], (), "sound", self.name, row)

    def is_correct(self, item: Item, prediction: str) -> bool:
        """Returns whether the prediction is one of the captions, word for word."""
        predicted = words(prediction)
        return bool(predicted) and predicted in [words(caption) for caption in item.row["captions"]]

    def question_scores(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Returns `cider` (arXiv 1411.5726, as CIDEr-D, 0 to 10), which weights words by the number of files with them.

        Texts are split into words without case and punctuation. The official tokenizer, which needs Java, splits
        words such as "don't" differently.
        """
        from pycocoevalcap.cider.cider import Cider

        items = [item for item in self.items if item.question_id in predictions]
        captions = {item.question_id: [" ".join(words(text)) for text in item.row["captions"]] for item in items}
        hypotheses = {name: [" ".join(words(predictions[name]))] for name in captions}
        _, scores = Cider().compute_score(captions, hypotheses)
        return {"cider": dict(zip(captions, map(float, scores), strict=True))}

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns None for the usual metrics that cannot be computed here; see `caveat`."""
        return dict.fromkeys(("spice", "spider", "fense"))

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str]:
        """Returns the CSV of DCASE's captioning tasks: file_name, caption_predicted."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file_name", "caption_predicted"])
        writer.writerows([q, " ".join(answer.split())] for q, answer in predictions.items())
        return f"{self.name}.csv", text.getvalue()


class Clotho(_Captions):
    """Clotho's evaluation split: `clotho_captions_evaluation.csv` (file_name, caption_1, ...) and `evaluation/`."""

    name = "clotho"
    files = ("clotho_captions_evaluation.csv",)
    prompt = "Describe what you hear in one sentence, in the style of Clotho."

    def _read(self) -> list[Item]:
        items = []
        for where, row in read_table(self.file, ["file_name"]):
            captions = [text for key, text in row.items() if key.startswith("caption_") and text.strip()]
            if not captions:
                raise UserError(where, "has no caption", "download the file again")
            items.append(self._item(self.file.parent / "evaluation" / row["file_name"], captions))
        return items


class AudioCaps(_Captions):
    """AudioCaps' test split: `test.csv` (audiocap_id, youtube_id, start_time, caption), one caption per line.

    Its publishers distribute no audio: the folder holds, at any depth, one file per clip, whose name begins with the
    YouTube id (11 characters) or with a `Y` and the id. Hidden files and files that are no audio do not count.
    """

    name = "audiocaps"
    files = ("test.csv",)
    prompt = "Describe what you hear in one sentence, in the style of AudioCaps."

    def _read(self) -> list[Item]:
        captions: dict[str, list[str]] = {}
        for _, row in read_table(self.file, ["youtube_id", "caption"]):
            captions.setdefault(row["youtube_id"].strip(), []).append(row["caption"])
        audio: dict[str, Path] = {}
        files = (file for file in self.file.parent.rglob("*.*") if file.suffix.lower() in AUDIO_SUFFIXES)
        for file in sorted(files, key=lambda path: (AUDIO_SUFFIXES.index(path.suffix.lower()), path)):
            if not file.name.startswith("."):
                for prefix in ("", "Y"):
                    if match := re.fullmatch(prefix + _CLIP_NAME, file.stem, re.ASCII | re.DOTALL):
                        audio.setdefault(match["id"], file)
        return [self._item(audio.get(clip, self.file.parent / clip), texts) for clip, texts in captions.items()]
