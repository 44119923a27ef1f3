"""`UserError` for mistakes that the user can correct, the exit codes, and the guard around every command."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # a signal ended a run that can resume; sysexits.h calls it EX_TEMPFAIL, "try again"


class UserError(Exception):
    """A mistake that the user can correct. Its message says where it is, what is wrong, and what to do.

    Args:
        where: config key, file or argument at fault.
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
    """Returns `did you mean 'x'?`, or the list of choices if none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(choices)}"


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main(argv)`; a `UserError` becomes one line on stderr and exit code 2.

    Args:
        argv: arguments of the command; None means those of this process (`python -m pipeline.<module>`).

    Returns:
        the exit code: 0 done, 2 the user's mistake, 1 a failure at run time, 130 interrupted.
    """
    from pipeline.core.console import configure_logging, logger

    configure_logging()
    # In no child process may a file `random.py` or a folder `pipeline` in the current folder replace the real one.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        try:
            return command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here and not when the interpreter exits, where a closed pipe could not be handled
    except UserError as error:
        logger.error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `pal ... | head`
        _discard_stdout()
        return EXIT_FAILURE


def _discard_stdout() -> None:
    """Redirects stdout to nowhere, so that flushing it when the interpreter exits cannot fail again."""
    with contextlib.suppress(OSError):  # stdout has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
