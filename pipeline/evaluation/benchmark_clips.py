"""A benchmark's audio files as clips with questions: read like a feature set, each file encoded when it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.feature_contract import Question
from pipeline.data.feature_set import Clip
from pipeline.data.question_table import QuestionTable
from pipeline.evaluation.benchmarks import Benchmark
from pipeline.inference.encode_audio import AudioEncoders, duration_s


class BenchmarkClips:
    """The questions of a benchmark, grouped by audio file.

    Args:
        audio_encoders: creates the encoders when the first file is encoded.

    Attributes:
        table: question table as of a feature set, without tasks, datasets and numbers of characters.
        is_text: False, as of a feature set with audio.
        identity: hash of the questions and of the sizes of the audio files.

    Raises:
        UserError: an audio file that cannot be opened.
    """

    is_text = False

    def __init__(self, benchmark: Benchmark, audio_encoders: Callable[[], AudioEncoders]) -> None:
        self.benchmark = benchmark
        self._make_audio_encoders = audio_encoders
        self._audio_encoders: AudioEncoders | None = None
        files: dict[Path, list[Question]] = {}
        domains: dict[Path, str] = {}
        for item in benchmark.items:
            domains.setdefault(item.audio, item.domain)
            question = Question(
                question_id=item.question_id,
                question=item.prompt,
                answer=item.answer,
                task=item.task,
                domain=item.domain,
            )
            files.setdefault(item.audio, []).append(question)
        self._files = list(files)
        self._clips = [
            Clip(str(file), duration_s(file), benchmark.name, domains[file], tuple(questions))
            for file, questions in files.items()
        ]
        sizes = [file.stat().st_size for file in files]
        contents = [(item.question_id, item.prompt, item.audio.name) for item in benchmark.items]
        self.identity = hashlib.sha256(repr((contents, sizes)).encode()).hexdigest()
        pairs = [(clip, n) for clip, questions in enumerate(files.values()) for n in range(len(questions))]
        clip, number = np.array(pairs, np.int64).T
        zeros = np.zeros(len(pairs), np.int32)
        durations = np.array([clip.duration_s for clip in self._clips])
        self.table = QuestionTable(clip, number.astype(np.int32), zeros, zeros, zeros, (), (), durations)

    def __len__(self) -> int:
        return len(self._clips)

    def clip(self, index: int) -> Clip:
        """Returns a clip with all its questions."""
        return self._clips[index]

    def features(self, index: int, clip_id: str) -> dict[str, NDArray[np.float16]]:
        """Returns encoder -> (frames, width) float16.

        Raises:
            UserError: audio that cannot be decoded, or an encoder that cannot be loaded.
        """
        if self._audio_encoders is None:
            self._audio_encoders = self._make_audio_encoders()
        return self._audio_encoders.encode(self._files[index]).features
