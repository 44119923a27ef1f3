"""The journal of an evaluation: answers on disk as they are generated, from which a killed evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class AnswerJournal:
    """The answers of one job, in a folder with one file for each process that ever worked on an evaluation.

    Attributes:
        folder: folder of the journal; several jobs may share it.
        fingerprint: identifies everything that determines the answers; answers with another fingerprint are ignored.
    """

    folder: Path
    fingerprint: str

    def read(self) -> dict[int, str]:
        """Returns index of the question -> answer, for all answers so far."""
        answers = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a killed process may have left half a line
                    fingerprint, question, answer = json.loads(line)
                    if fingerprint == self.fingerprint:
                        answers[question] = answer
        return answers

    @contextmanager
    def open_file(self) -> Iterator[IO[str]]:
        """Opens a new file of the journal for this process."""
        with (self.folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8") as file:
            yield file

    def append(self, file: IO[str], answers: Mapping[int, str]) -> None:
        """Writes answers to a file from `open_file` at once."""
        file.write("".join(json.dumps([self.fingerprint, *answer]) + "\n" for answer in answers.items()))
        file.flush()


def fingerprint_job(model_fingerprint: str, max_new_tokens: int, pairing: Mapping[int, int], identity: str) -> str:
    """Returns the fingerprint of everything that determines the answers.

    Args:
        pairing: clip of the questions -> clip of the audio.
        identity: identity of the question set.
    """
    parts = [model_fingerprint, max_new_tokens, sorted(pairing.items()), identity]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fingerprint_model(folder: Path) -> str:
    """Returns a hash of all files of an exported model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
