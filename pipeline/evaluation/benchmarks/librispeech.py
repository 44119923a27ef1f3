"""LibriSpeech: transcripts, scored by jiwer's word error rate (the extra `speech`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.text_forms import canonical, words
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_text

PROMPT = "Write down what is said, word for word."


class LibriSpeech(Benchmark):
    """One part (`test-clean`, ...): `<speaker>/<chapter>/<speaker>-<chapter>.trans.txt` beside FLAC files."""

    name = "librispeech"
    files = ()

    def _find(self, folder: Path) -> Path:
        return folder

    def _read(self) -> list[Item]:
        try:
            import jiwer  # noqa: F401
        except ImportError as error:
            raise UserError("librispeech", "needs jiwer", "pip install 'pal-pipeline[speech]'") from error
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
        return self._wer([item.answer], [prediction]) == 0

    def extra_metrics(self, predictions: Mapping[str, str]) -> dict[str, float | None]:
        """Returns `wer`: substituted, deleted and inserted words over the words of the transcripts."""
        answered = [
            (item.answer, predictions[item.question_id]) for item in self.items if item.question_id in predictions
        ]
        return {"wer": self._wer(*map(list, zip(*answered, strict=True)))}

    @staticmethod
    def _wer(references: list[str], hypotheses: list[str]) -> float:
        """Returns the word error rate of the canonical forms without case and punctuation, which transcripts lack."""
        import jiwer

        plain = jiwer.Compose(
            [
                jiwer.ToLowerCase(),
                jiwer.SubstituteRegexes({r"[^\w\s']": " "}),
                jiwer.RemoveMultipleSpaces(),
                jiwer.Strip(),
                jiwer.ReduceToListOfListOfWords(),
            ]
        )
        references, hypotheses = list(map(canonical, references)), list(map(canonical, hypotheses))
        return float(jiwer.wer(references, hypotheses, reference_transform=plain, hypothesis_transform=plain))
