"""Compares the length that a header states with the bytes of the file, which libsndfile does not report.

A recorder that was killed, a pipe or an interrupted copy leaves a header that states more or less audio than the file
holds; MP3 without an index states no length at all, and joined files state the length of the first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from typing_extensions import Buffer

from data_prep.audio.mp3 import Unusable, repaired_mp3

MAX_RIFF_BYTES = (1 << 32) - 1
MAX_HEAD_BYTES = 1 << 24  # chunks before the audio of a header that is rewritten
IGNORED_TAIL_S = 0.01  # unexplained bytes after the audio: padding, a byte of rounding


@dataclass(frozen=True)
class Length:
    """The outcome of a check.

    Attributes:
        fault: why the length cannot be trusted, or None; the clip is then rejected as `truncated`.
        is_cut: whether the fault is a missing end alone, so that what the file holds is right.
        note: what was repaired, or None.
        stream: the audio with a correct header, where libsndfile would read too little of the file itself.
    """

    fault: str | None = None
    is_cut: bool = False
    note: str | None = None
    stream: BinaryIO | None = None


class Spliced(io.RawIOBase):
    """A read-only stream: `head`, then the bytes of another stream from `start` on."""

    def __init__(self, head: bytes, stream: BinaryIO, start: int) -> None:
        self._head, self._stream, self._start = head, stream, start
        self._size = len(head) + stream.seek(0, io.SEEK_END) - start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        wanted = memoryview(buffer).nbytes
        data = self._head[self._position : self._position + wanted]
        if len(data) < wanted:
            self._stream.seek(self._start + self._position + len(data) - len(self._head))
            data += self._stream.read(wanted - len(data))
        memoryview(buffer).cast("B")[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def check_length(stream: BinaryIO) -> Length:
    """Compares the length in the header of a WAV, AIFF, AU, W64, FLAC, Ogg or MP3 file with its bytes."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _check_wav(stream, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        for name, start, stated in _chunks(stream, 12, size, "big"):
            if name == b"SSND":
                return _cut(start, stated, size)
    elif head[:4] == b".snd":
        start, stated = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        if stated != MAX_RIFF_BYTES:
            return _extra(start, stated, size) if start + stated < size else _cut(start, stated, size)
    elif head[:4] == b"riff":
        return _check_w64(stream, size)
    elif head[:4] == b"fLaC":
        return _joined(stream, b"fLaC\x00\x00\x00\x22")
    elif head[:4] == b"OggS":
        return _check_ogg(stream, size)
    elif head[:3] == b"ID3" or head[:1] == b"\xff":
        try:
            repaired = repaired_mp3(stream)
        except Unusable as error:
            return Length(fault=str(error))
        if repaired is not None:
            first_bytes, start, note = repaired
            return Length(note=note, stream=_buffered(Spliced(first_bytes, stream, start)))
    return Length()


def _check_wav(stream: BinaryIO, size: int) -> Length:
    byte_rate, ds64 = 0, None
    for name, start, stated in _chunks(stream, 12, size, "little"):
        if name == b"fmt ":
            stream.seek(start + 8)
            byte_rate = int.from_bytes(stream.read(4), "little")
        elif name == b"ds64":
            stream.seek(start + 8)
            ds64 = int.from_bytes(stream.read(8), "little")
        elif name == b"data":
            if stated == MAX_RIFF_BYTES and ds64 not in (None, 0):
                return _cut(start, ds64 or 0, size)
            return _check_wav_data(stream, start, stated, size, byte_rate)
    return Length()


def _check_wav_data(stream: BinaryIO, start: int, stated: int, size: int, byte_rate: int) -> Length:
    available = size - start
    note = f"the header states {stated} bytes of audio, read {available} up to the end of the file"
    if stated > available and _is_placeholder(stated):  # libsndfile reads to the end
        return Length(note=note)
    if stated > available:
        return _cut(start, stated, size)
    tail = start + stated + stated % 2
    if size - tail <= max(8, IGNORED_TAIL_S * byte_rate) or _are_chunks(stream, tail, size):
        return Length()
    if stated == 0 and start <= MAX_HEAD_BYTES and available <= MAX_RIFF_BYTES - start:
        stream.seek(0)
        header = bytearray(stream.read(start))
        header[:8] = b"RIFF" + (size - 8).to_bytes(4, "little")
        header[-4:] = available.to_bytes(4, "little")
        return Length(note=note, stream=_buffered(Spliced(bytes(header), stream, start)))
    return _extra(start, stated, size)


def _check_w64(stream: BinaryIO, size: int) -> Length:
    position = 40
    while position + 24 <= size:
        stream.seek(position)
        name, stated = stream.read(4), int.from_bytes(stream.read(20)[12:], "little")
        if name == b"data":
            return _cut(position + 24, stated - 24, size)
        if stated < 24:
            break
        position += stated + -stated % 8
    return Length()


def _check_ogg(stream: BinaryIO, size: int) -> Length:
    """Finds a stream that begins after the pages of another, where libsndfile stops without an error."""
    position, began = 0, False
    while position + 27 <= size:
        stream.seek(position)
        page = stream.read(27)
        if page[:4] != b"OggS":
            break
        first = bool(page[5] & 2)
        if first and began:
            return Length(fault=f"another stream begins at byte {position}: the file was joined from several")
        began = began or not first
        position += 27 + page[26] + sum(stream.read(page[26]))
    return Length()


def _joined(stream: BinaryIO, signature: bytes) -> Length:
    position = 4
    overlap = b""
    stream.seek(position)
    while block := stream.read(1 << 20):
        found = (overlap + block).find(signature)
        if found >= 0:
            at = position - len(overlap) + found
            return Length(fault=f"another file begins at byte {at}: the file was joined from several")
        position += len(block)
        overlap = (overlap + block)[-len(signature) + 1 :]
    return Length()


def _cut(start: int, stated: int, size: int) -> Length:
    missing = start + stated - size
    if missing <= 8:
        return Length()
    return Length(fault=f"the header states {stated} bytes of audio, the file holds {size - start}", is_cut=True)


def _extra(start: int, stated: int, size: int) -> Length:
    return Length(fault=f"the header states {stated} bytes of audio, {size - start - stated} unknown bytes follow them")


def _is_placeholder(stated: int) -> bool:
    """Returns whether a size is what programs write that do not know it: ffmpeg, arecord and SoX into a pipe."""
    return stated >= 0xFFFF0000 or 0x7FFF0000 <= stated <= 0x8000FFFF


def _chunks(stream: BinaryIO, position: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start and stated size of each chunk."""
    while position + 8 <= size:
        stream.seek(position)
        header = stream.read(8)
        stated = int.from_bytes(header[4:], "big" if order == "big" else "little")
        yield header[:4], position + 8, stated
        position += 8 + stated + stated % 2


def _are_chunks(stream: BinaryIO, position: int, size: int) -> bool:
    """Returns whether chunks, or a tag of ID3, explain all bytes up to the end of the file."""
    stream.seek(position)
    if stream.read(3) in (b"ID3", b"TAG"):
        return True
    for name, start, stated in _chunks(stream, position, size, "little"):
        if name == b"RIFF" or not all(32 <= byte < 127 for byte in name) or start + stated > size:
            return False
    return True


def _buffered(stream: io.RawIOBase) -> BinaryIO:
    return io.BufferedReader(stream, 1 << 16)
