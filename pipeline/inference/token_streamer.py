"""Decodes an answer while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pipeline.data.chat_template import ChatTemplate


class TokenStreamer(BaseStreamer):
    """Decodes one answer while it is generated.

    Args:
        write: is called with each new piece of text.

    Attributes:
        times_s: time of each token, from `time.perf_counter`.
    """

    def __init__(self, chat_template: ChatTemplate, write: Callable[[str], None]) -> None:
        self._chat_template, self._write = chat_template, write
        self._ids: list[int] = []
        self._written = ""
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        if not value.numel():  # transformers first passes the ids of the prompt, which is empty
            return
        self.times_s.append(time.perf_counter())
        self._ids += value.flatten().tolist()
        text = self._chat_template.decode(self._ids)
        if not text.endswith("\ufffd"):  # an incomplete character, whose last bytes are in later tokens
            self._write(text.removeprefix(self._written))
            self._written = text

    def end(self) -> None:
        self._write(self._chat_template.decode(self._ids).removeprefix(self._written))
