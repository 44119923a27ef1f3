"""The one exception for a user's mistake. Owns its wording; `pipeline.cli` turns it into exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can repair: names the field or file, what is wrong with it, and what to do.

    Args:
        where: the config key, file or argument at fault.
        fault: what is wrong with it.
        remedy: what the user should do about it.
    """

    def __init__(self, where: object, fault: str, remedy: str) -> None:
        super().__init__(where, fault, remedy)  # picklable: Ray and DataLoader workers re-raise it
        self.where = str(where)
        self.fault = fault
        self.remedy = remedy

    def __str__(self) -> str:
        return " ".join(f"{self.where}: {self.fault}; {self.remedy}".split())


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of choices when nothing is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(choices)}"
