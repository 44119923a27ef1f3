"""Keeps secrets out of logs: finds the environment variables that hold one and replaces their values by stars."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_SHORTEST_SECRET = 8  # shorter values are ordinary words, and redacting those would make a log unreadable


def holds_secret(name: str, value: str) -> bool:
    """Returns whether an environment variable holds a secret, judging by its name and value."""
    is_named_secret = _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("/")
    return bool(is_named_secret or _PASSWORD_IN_URL.search(value))


def environment_secrets() -> list[str]:
    """Returns the secrets in this environment and in `.deepspeed_env`, whose lines the launcher writes to its log."""
    variables = [*os.environ.items()]
    for folder in (Path.home(), Path()):
        with contextlib.suppress(OSError):
            lines = (folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")).read_text(encoding="utf-8").splitlines()
            variables += [(name.strip(), value.strip()) for name, _, value in (line.partition("=") for line in lines)]
    secrets = [value for name, value in variables if holds_secret(name, value)]
    return list(dict.fromkeys([*secrets, *(form for value in secrets for form in _on_command_line(value))]))


def _on_command_line(value: str) -> list[str]:
    """Returns the forms in which the launcher writes a value onto the command line for other hosts."""
    quoted = shlex.quote(value)
    return [quoted, quoted.replace("%", "%%"), value.replace("%", "%%")]


def redact(text: str, secrets: Sequence[str]) -> str:
    """Returns the text with stars in place of secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
