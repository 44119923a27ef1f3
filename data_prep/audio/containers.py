"""Recognises audio files by name and by content, and names the formats that libsndfile does not decode."""

from __future__ import annotations

import posixpath

HEAD_BYTES = 32  # enough for every signature below
DECODABLE_SUFFIXES = frozenset(
    [
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".opus",
        ".oga",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".w64",
        ".rf64",
        ".voc",
        ".mp2",
        ".sph",
    ]
)
_VIDEO_SUFFIXES = frozenset([".mp4", ".webm", ".mkv", ".mov", ".avi"])
_OTHER_SUFFIXES = frozenset(
    [".m4a", ".m4b", ".aac", ".wma", ".amr", ".ape", ".wv", ".mka", ".3gp", ".ac3", ".dts", ".tta", ".spx", ".weba"]
)
AUDIO_SUFFIXES = DECODABLE_SUFFIXES | _OTHER_SUFFIXES | _VIDEO_SUFFIXES
PARTIAL_SUFFIXES = frozenset([".part", ".crdownload", ".download", ".tmp", ".temp", ".ytdl", ".aria2", ".partial"])

# (offset, signature) -> format; None for formats that libsndfile decodes.
_SIGNATURES: dict[tuple[int, bytes], str | None] = {
    (8, b"WAVE"): None,
    (0, b"fLaC"): None,
    (0, b"OggS"): None,
    (0, b"ID3"): None,
    (8, b"AIFF"): None,
    (8, b"AIFC"): None,
    (0, b".snd"): None,
    (0, b"caff"): None,
    (0, b"riff\x2e\x91"): None,
    (0, b"Creative Voice File"): None,
    (0, b"NIST_1A"): None,
    (4, b"ftyp"): "MPEG-4 (M4A, AAC)",
    (0, b"ADIF"): "AAC",
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"): "Windows Media (WMA)",
    (0, b"#!AMR"): "AMR",
    (0, b"MAC "): "Monkey's Audio",
    (0, b"wvpk"): "WavPack",
    (0, b"\x1a\x45\xdf\xa3"): "Matroska or WebM",
    (0, b"MPCK"): "Musepack",
    (0, b"TTA1"): "True Audio",
    (0, b".RMF"): "RealMedia",
}


def suffix(name: str) -> str:
    """Returns the lower-case ending of a file name, with its dot."""
    return posixpath.splitext(name)[1].lower()


def is_hidden(path: str) -> bool:
    """Returns whether a path is hidden or lies in a folder that operating systems and notebooks create."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def is_audio(name: str, head: bytes) -> bool:
    """Returns whether a file is audio by its ending or, where the ending is none of audio, by its first bytes.

    An unfinished download is not audio.
    """
    ending = suffix(name)
    return ending in AUDIO_SUFFIXES or (ending not in PARTIAL_SUFFIXES and _is_audio_head(head))


def undecodable_format(head: bytes) -> str | None:
    """Returns the name of an audio format that libsndfile does not decode, or None."""
    for (offset, signature), name in _SIGNATURES.items():
        if name is not None and head[offset:].startswith(signature):
            return name
    return "AAC" if _is_mpeg_sync(head) and not head[1] & 0b110 else None


def _is_audio_head(head: bytes) -> bool:
    known = any(head[offset:].startswith(signature) for offset, signature in _SIGNATURES)
    is_text = not any(byte < 9 or 13 < byte < 32 for byte in head)  # a caption may begin with "MAC "
    return (known and not is_text) or _is_mpeg_sync(head)


def _is_mpeg_sync(head: bytes) -> bool:
    """Returns whether a frame of MPEG audio or AAC starts here; FF FE is the byte-order mark of UTF-16."""
    return len(head) > 3 and head[0] == 0xFF and head[1] >= 0xE0 and head[1] < 0xFE and head[1] & 0b11000 != 0b01000
