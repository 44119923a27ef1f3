"""What DeepSpeed's launcher sends to the shell of another host arrives there as it was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import deepspeed_launcher

HARMFUL = [
    "output=runs/$(touch hacked)",
    "a;touch hacked",
    "tags={a: 'b c', d: \"e\"}",
    "`touch hacked`",
    "100%h %n",
    "it's $HOME & more > hacked",
    "~/x*[ab]?",
    "",
]
ECHO = """#!{python}
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "folder": os.getcwd(), "env": dict(os.environ)}}))
"""


def run_remotely(command: list[str], folder: Path) -> dict[str, Any]:
    """Runs the command as pdsh and ssh do: joins its words, replaces `%n` and `%%`, and passes it to a shell."""
    words = command[command.index("host") + 1 :]
    line = " ".join(words).replace("%%", "\0").replace("%n", "0").replace("%h", "host").replace("\0", "%")
    environment = {"PATH": os.environ["PATH"], "HOME": "/root"}
    done = subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", ["plain", "my runs", "$(touch hacked)", "a;b'c", "100%h"])
def test_arguments_variables_and_folders_arrive_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    python = folder / "python"
    python.write_text(ECHO.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(python))
    options = {"user_args": HARMFUL, "user_script": "pipeline.train", "ssh_port": None, "launcher_args": ""}
    options |= {"master_addr": "host", "master_port": 1, "venv_script": None, "no_python": False, "module": True}
    options |= {"no_local_rank": True, "save_pid": False, "enable_each_rank_log": None}
    runner = deepspeed_launcher.QuotingRunner(Namespace(**options), "e30=")
    runner.add_export("PYTHONPATH", str(folder))  # as DeepSpeed adds the current folder
    for number, value in enumerate(HARMFUL):
        runner.add_export(f"VALUE_{number}", value)
    command, _, _ = runner.get_cmd({}, {"host": [0]})
    result = run_remotely(command, tmp_path)
    assert result["argv"][-len(HARMFUL) - 1 :] == ["pipeline.train", *HARMFUL]
    assert result["folder"] == str(folder)
    assert [result["env"][f"VALUE_{number}"] for number in range(len(HARMFUL))] == HARMFUL
    assert "--node_rank=0" in result["argv"] and "PYTHONPATH" not in result["env"]
    assert not list(tmp_path.rglob("hacked"))
