"""The progress line of a preparation: a live line on a terminal, a plain one now and then in a log."""

from __future__ import annotations

import sys
import time

PLAIN_EVERY_S = 15.0


class ProgressLine:
    """Clips done, speed over this run, rejects and time left, on stderr."""

    def __init__(self, clips: int, clips_before: int) -> None:
        self._clips = clips
        self._before = clips_before
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()
        self._last = self._start

    def update(self, clips: int, audio_s: float, rejects: int, workers: int, force: bool = False) -> None:
        """Args: clips, audio_s and rejects so far, earlier runs' clips included, their audio not."""
        now = time.monotonic()
        if not force and now - self._last < (0.2 if self._live else PLAIN_EVERY_S):
            return
        self._last = now
        elapsed = max(now - self._start, 1e-9)
        rate = (clips - self._before) / elapsed
        left = f"{_clock((self._clips - clips) / rate)} left" if rate > 0 else "time left unknown"
        line = (
            f"{clips}/{self._clips} clips, {rate:.1f} clips/s, {audio_s / 3600 / elapsed:.3g} audio-hours/s, "
            f"{rejects} rejected, {workers} worker{'s' if workers != 1 else ''}, {left}"
        )
        sys.stderr.write(f"\r\x1b[2K{line}" if self._live else f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._live:
            sys.stderr.write("\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
