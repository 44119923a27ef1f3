"""A real Slurm on simulated hosts: munged, slurmctld and one slurmd per host, all of which end with the hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import Host, hosts_named, namespaces_work

# Debian and Red Hat do not have daemons in a user's PATH.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_DAEMONS = ("munged", "slurmctld", "slurmd")
# The nodes have the sizes that the scripts request, whatever this machine has; their GPUs are empty files. Credentials
# expire soon because a requeued job waits for that.
_CONF = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes} CPUs=96 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

needs_slurm = pytest.mark.skipif(
    not (namespaces_work() and all(shutil.which(daemon, path=_PATH) for daemon in _DAEMONS)),
    reason="needs Slurm, munge, root and Linux namespaces",
)


class Slurm:
    """A Slurm cluster; `folder` holds its logs."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self._environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: object, **variables: str) -> str:
        """Runs a Slurm command on the first host and returns its output."""
        done = subprocess.run(
            self.hosts[0].command(*words),
            env={**self._environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}"
        return done.stdout.strip()

    def start(self, host: Host, *words: str) -> None:
        subprocess.Popen(
            host.command(*words), env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def state(self, job: str) -> dict[str, str]:
        """Returns what Slurm knows about a job, which it remembers for a few minutes after its end."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, limit_s: float) -> dict[str, str]:
        deadline = time.monotonic() + limit_s
        while (state := self.state(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {state['JobState']} after {limit_s} s, not {states}"
            time.sleep(0.5)
        return state


@contextlib.contextmanager
def slurm_of(names: list[str], folder: Path) -> Iterator[Slurm]:
    """Starts a Slurm cluster with nodes of these names."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_CONF.format(first=names[0], nodes=",".join(names), folder=folder))
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    with hosts_named(names, folder) as hosts:
        slurm = Slurm(hosts, folder)
        munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        slurm.start(hosts[0], "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        deadline = time.monotonic() + 60
        while not (folder / "munge.socket").exists():
            assert time.monotonic() < deadline, "munged does not start"
            time.sleep(0.1)
        slurm.start(hosts[0], "slurmctld", "-D")
        for host in hosts:
            slurm.start(host, "slurmd", "-D")
        while True:
            with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
                if slurm.run("sinfo", "--noheader", "--format=%T").split() == ["idle"]:
                    break
            assert time.monotonic() < deadline, f"nodes do not come up, see {folder}"
            time.sleep(0.5)
        yield slurm
