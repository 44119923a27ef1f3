"""Counts the frames of MPEG audio, whose length libsndfile takes from an index that may be missing or wrong."""

from __future__ import annotations

from typing import BinaryIO

_BITRATES = {  # (MPEG 1, layer) -> kbit/s
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_FIXED_BITS = 0xFFFE0C00  # sync, version, layer and rate: equal in all frames of one stream
_MAX_JUNK_BYTES = 16384  # bytes between frames, tags excluded, that are taken for padding or a damaged frame


class Unusable(Exception):
    """A file whose frames cannot be decoded as one stream; the message is the reason."""


def repaired_mp3(stream: BinaryIO) -> tuple[bytes, int, str] | None:
    """Returns a correct index frame, the position of the first frame after it and a note; None if the index is right.

    Layer III only. An index that counts more frames than the file holds is left as it is: decoding then ends early.

    Raises:
        Unusable: the file was joined from several with different sample rates or numbers of channels.
    """
    stream.seek(0)
    data = stream.read()
    start = _first_frame(data)
    if start is None:
        return None
    header = int.from_bytes(data[start : start + 4], "big")
    if header >> 17 & 3 != 1:
        return None
    size = _frame_bytes(header)
    index = _index_frames(data[start : start + size], header)
    first_bytes = start if index is None else start + size
    frames, bitrates = _count_frames(data, first_bytes, header)
    if index is None and len(bitrates) == 1 and _is_whole(header):  # libsndfile computes the length from the size
        return None
    if index is not None and frames <= index + 1:
        return None
    known = "there is no index" if index is None else f"the index counts {index}"
    return _index_frame(header, frames), first_bytes, f"the file holds {frames} frames, {known}"


def _first_frame(data: bytes) -> int | None:
    """Returns the position of the first frame that another one follows, after a tag of ID3 version 2."""
    position = 0
    while data[position : position + 3] == b"ID3" and len(data) > position + 10:
        position += _tag_bytes(data, position)
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 4:
        header = int.from_bytes(data[position : position + 4], "big")
        size = _frame_bytes(header)
        following = int.from_bytes(data[position + size : position + size + 4], "big")
        if size and following & _FIXED_BITS == header & _FIXED_BITS:
            return position
        position += 1
    return None


def _count_frames(data: bytes, position: int, first: int) -> tuple[int, set[int]]:
    """Returns the number of frames from a position on that continue the first one, and their bitrates.

    Raises:
        Unusable: see `repaired_mp3`.
    """
    frames, junk, bitrates = 0, 0, set[int]()
    while position + 4 <= len(data):
        header = int.from_bytes(data[position : position + 4], "big")
        size = _frame_bytes(header) if header & _FIXED_BITS == first & _FIXED_BITS else 0
        if size:
            if (header >> 6 & 3 == 3) != (first >> 6 & 3 == 3):
                raise Unusable(f"the number of channels changes at byte {position}: the file was joined from several")
            if position + size > len(data):
                break
            frames += 1
            bitrates.add(header >> 12 & 15)
            position += size
            continue
        if tag := _tag_bytes(data, position):
            position += tag
            continue
        if _is_stream(data, position):
            raise Unusable(f"the sample rate changes at byte {position}: the file was joined from several")
        following = data.find(b"\xff", position + 1)
        following = len(data) if following < 0 else following
        junk += following - position - data.count(0, position, following)
        if junk > _MAX_JUNK_BYTES:
            raise Unusable(f"bytes up to {following} do not continue the audio: the file was joined from several")
        position = following
    return frames, bitrates


def _tag_bytes(data: bytes, position: int) -> int:
    """Returns the size of a tag (ID3, APE) at a position; 0 where there is none."""
    if data[position : position + 3] == b"ID3" and len(data) > position + 10:
        size = data[position + 6 : position + 10]
        return 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    if data[position : position + 3] == b"TAG":
        return 128
    if data[position : position + 8] == b"APETAGEX":
        return 32 + int.from_bytes(data[position + 12 : position + 16], "little")
    return 0


def _is_stream(data: bytes, position: int) -> bool:
    """Returns whether three frames of one kind follow each other from a position on."""
    first = int.from_bytes(data[position : position + 4], "big")
    for _ in range(3):
        header = int.from_bytes(data[position : position + 4], "big")
        if not _frame_bytes(header) or header & _FIXED_BITS != first & _FIXED_BITS:
            return False
        position += _frame_bytes(header)
    return True


def _is_whole(header: int) -> bool:
    """Returns whether all frames of one bitrate have the same size, so that their number follows from the bytes."""
    rate = _RATES[header >> 19 & 3][header >> 10 & 3]
    return rate % 8000 == 0


def _frame_bytes(header: int) -> int:
    """Returns the size of a frame; 0 for what is no header, or a free bitrate."""
    version, layer, bitrate, rate = header >> 19 & 3, 4 - (header >> 17 & 3), header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0
    bits_per_s = 1000 * _BITRATES[version == 3, layer][bitrate - 1]
    padding = header >> 9 & 1
    if layer == 1:
        return (12 * bits_per_s // _RATES[version][rate] + padding) * 4
    return (72 if layer == 3 and version != 3 else 144) * bits_per_s // _RATES[version][rate] + padding


def _index_offset(header: int) -> int:
    """Returns where the index stands in its frame: after the header and the side information of one or two channels."""
    mono = header >> 6 & 3 == 3
    return 4 + ((17 if mono else 32) if header >> 19 & 3 == 3 else (9 if mono else 17))


def _index_frames(frame: bytes, header: int) -> int | None:
    """Returns the number of frames that the index in this frame counts; None when it is no index."""
    offset = _index_offset(header)
    if frame[offset : offset + 4] in (b"Xing", b"Info"):
        return int.from_bytes(frame[offset + 8 : offset + 12], "big") if frame[offset + 7] & 1 else 0
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big")
    return None


def _index_frame(header: int, frames: int) -> bytes:
    """Returns a frame without audio whose index counts the frames after it."""
    header = header & ~(15 << 12) | 9 << 12 | 1 << 16  # a bitrate that has room for the index; no checksum
    offset = _index_offset(header)
    frame = bytearray(_frame_bytes(header))
    frame[:4] = header.to_bytes(4, "big")
    frame[offset : offset + 12] = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return bytes(frame)
