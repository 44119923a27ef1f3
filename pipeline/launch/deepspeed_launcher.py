"""The `deepspeed` launcher, with values that reach the shells of other hosts quoted.

DeepSpeed puts arguments, variables and the current folder onto the command line of `pdsh`, which substitutes `%h` and
the like and passes the line to a shell on every host. DeepSpeed quotes only what contains a space, and with double
quotes: a `$(...)` or a `;` in an override or a path would run there. DeepSpeed also puts the current folder in front of
all modules there, so that a file `random.py` in it would replace Python's own."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.launcher import multinode_runner, runner


def remote_word(text: str) -> str:
    """Returns the text as one word of a shell behind pdsh, which replaces `%%` by `%`."""
    return shlex.quote(text).replace("%", "%%")


class QuotingRunner(multinode_runner.PDSHRunner):
    """DeepSpeed's runner for pdsh, with every value quoted."""

    def add_export(self, key: str, var: str) -> None:
        """Adds a variable to those that ranks receive."""
        if key == "PYTHONPATH":  # DeepSpeed has put the current folder in front
            if "PYTHONPATH" not in os.environ:
                return
            var = os.environ["PYTHONPATH"]
        self.exports[key.strip()] = remote_word(var.strip())

    def parse_user_args(self) -> list[str]:
        """Returns the arguments of the ranks as words of a shell."""
        return [remote_word(argument) for argument in self.args.user_args]

    def get_cmd(
        self, environment: dict[str, str], active_resources: Mapping[str, Sequence[int]]
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """Returns the pdsh command, the command that ends the job, and the environment of both."""
        command, kill, environment = super().get_cmd(environment, active_resources)
        folder = os.path.abspath(".")  # noqa: PTH100 (as DeepSpeed writes it)
        quoted = {f"cd {folder};": f"cd {remote_word(folder)};", sys.executable: remote_word(sys.executable)}
        return [quoted.get(word, word) for word in command], kill, environment


def main(arguments: Sequence[str] | None = None) -> Any:
    """Runs DeepSpeed's launcher."""
    runner.PDSHRunner = QuotingRunner
    runner.LAUNCHER_CLASSES[runner.PDSH_LAUNCHER] = QuotingRunner
    return runner.main(arguments)


if __name__ == "__main__":
    main()
