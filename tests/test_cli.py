"""`pal`: fast help, the version, exit codes, one line for a user error, and closed pipes."""

import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from pipeline import cli
from pipeline.core.errors import UserError, run_command

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "streaming", "transformers", "matplotlib")


def pal(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True)


def test_help_is_quick_and_lists_every_command() -> None:
    start = time.perf_counter()
    result = pal("--help")
    assert time.perf_counter() - start < 1.0
    assert result.returncode == 0
    assert all(name in result.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_loads_no_heavy_library(name: str) -> None:
    # Import time varies with the machine's load; what is imported does not.
    code = (
        "import sys; from pipeline import cli\n"
        f"try: cli.main({[*name.split(), '--help']!r})\n"
        "except SystemExit as done: assert done.code == 0\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_the_version_is_that_of_the_package() -> None:
    result = pal("--version")
    assert (result.returncode, result.stdout) == (0, f"pal {version('pal-pipeline')}\n")


@pytest.mark.parametrize("arguments", ["--help", "train --help"])
def test_a_reader_that_closes_the_pipe_causes_no_traceback(arguments: str) -> None:
    # The shell's `:` closes its end of the pipe without reading.
    command = f"{{ {sys.executable} -m pipeline.cli {arguments}; echo code $? >&2; }} | :"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.stderr in ("code 0\n", "code 1\n"), "0 if the pipe was closed after the last byte"


def test_output_that_is_flushed_into_a_closed_pipe_ends_with_code_1() -> None:
    code = (
        "import os, sys; from pipeline.core.errors import run_command\n"
        "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader)\n"
        "sys.exit(run_command(lambda argv: print('text') or 0, []))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")


def test_unknown_command_names_the_nearest() -> None:
    result = pal("tran")
    assert result.returncode == 2
    assert result.stderr == "pal: tran: is not a command; did you mean 'train'?\n"


def test_user_error_is_one_line_and_two(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: object) -> int:
        raise UserError("a.yaml", "is\nbroken", "repair it")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "pal: a.yaml: is broken; repair it\n"


def test_failure_at_run_time_keeps_its_traceback() -> None:
    def command(argv: object) -> int:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        run_command(command, [])
