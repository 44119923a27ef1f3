"""Secrets stay out of logs: which variables hold one, and stars in its place."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

_SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_SHORTEST_SECRET = 8  # shorter values are words, and masking them would make a log unreadable


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable holds what nobody should read in a log."""
    named_so = _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("/")
    return bool(named_so or _PASSWORD_IN_URL.search(value))


def environment_secrets() -> list[str]:
    """Values of such variables in this environment, and in the files whose lines the launcher writes into its log."""
    variables = [*os.environ.items()]
    for folder in (Path.home(), Path()):
        with contextlib.suppress(OSError):
            lines = (folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")).read_text(encoding="utf-8").splitlines()
            variables += [(name.strip(), value.strip()) for name, _, value in (line.partition("=") for line in lines)]
    return [value for name, value in variables if holds_secret(name, value)]


def redact(text: str, secrets: Sequence[str]) -> str:
    """The text with stars in the place of secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
