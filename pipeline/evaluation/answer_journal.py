"""The journal of an evaluation: answers on disk as they are generated, from which a killed evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.inference.responder import Reply


@dataclass(frozen=True)
class AnswerJournal:
    """The answers of one job, in a folder with one file for each process that ever worked on an evaluation.

    Attributes:
        folder: folder of the journal; several jobs may share it.
        fingerprint: identifies everything that determines the answers; answers with another fingerprint are ignored.
    """

    folder: Path
    fingerprint: str

    def read(self) -> dict[int, Reply]:
        """Returns index of the question -> answer, for all answers so far."""
        answers = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a killed process may have left half a line
                    fingerprint, question, *reply = json.loads(line)
                    if fingerprint == self.fingerprint:
                        answers[question] = Reply(*reply)
        return answers

    @contextmanager
    def open_file(self) -> Iterator[IO[str]]:
        """Opens a new file of the journal for this process."""
        with (self.folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8") as file:
            yield file

    def append(self, file: IO[str], answers: Mapping[int, Reply]) -> None:
        """Writes answers to a file from `open_file` at once."""
        lines = [[self.fingerprint, index, reply.text, reply.truncated] for index, reply in answers.items()]
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()


def fingerprint_job(
    model_fingerprint: str, decoding: Mapping[str, Any], pairing: Mapping[int, int], identity: str
) -> str:
    """Returns the fingerprint of everything that determines the answers.

    Args:
        decoding: settings of decoding.
        pairing: clip of the questions -> clip of the audio.
        identity: identity of the question set.
    """
    parts = [model_fingerprint, decoding, sorted(pairing.items()), identity]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def fingerprint_model(folder: Path) -> str:
    """Returns a hash of all files of an exported model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
