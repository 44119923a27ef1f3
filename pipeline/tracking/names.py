"""Names as MLflow accepts them: of metrics, parameters, tags and artifacts, for training and evaluation alike.

Users name tasks, domains and sets. A name that MLflow would refuse is replaced by a similar one that ends with a
hash of the original, so that `a,b` and `a;b` do not meet; a tag of the run keeps the original."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

ORIGINAL = "pal.name."  # begins a tag: ORIGINAL + name in MLflow -> original name
_MAX_LENGTH = 200  # MLflow allows 250, and the tag has a prefix
_HASH_LENGTH = 8
_REFUSED = re.compile(r"[^/\w.\- :]")
_REFUSED_IN_PATH = re.compile(r"[^/\w.\- ]")

Value = TypeVar("Value")


def clean(name: str) -> str:
    """Returns the name of a metric, parameter or tag in MLflow: the name itself if MLflow accepts it."""
    return _replace(name, _REFUSED)


def clean_path(path: str) -> str:
    """Returns the path of an artifact in MLflow; its suffix stays."""
    stem, suffix = posixpath.splitext(path)
    return _replace(stem, _REFUSED_IN_PATH) + suffix


def _replace(name: str, refused: re.Pattern[str]) -> str:
    accepted = "/".join("_" if part in ("", ".", "..") else part for part in refused.sub("_", name).split("/"))
    if accepted == name and len(name) <= _MAX_LENGTH:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_LENGTH]
    return f"{accepted[: _MAX_LENGTH - _HASH_LENGTH - 1]}-{digest}"


def originals(cleaned: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the tags that keep the original of every (name in MLflow, original) pair that differs."""
    return {ORIGINAL + name: original for name, original in cleaned if name != original}


def restore(values: Mapping[str, Value], tags: Mapping[str, str]) -> dict[str, Value]:
    """Returns values of a run under their original names."""
    return {tags.get(ORIGINAL + name, name): value for name, value in values.items()}
