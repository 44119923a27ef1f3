"""Simulated hosts on this machine, made of Linux namespaces: each has its own network, name, processes, shared memory.

They share the file system, like nodes of a cluster. The processes of a host end with it, and it with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_TOOLS = ("unshare", "nsenter", "ip", "mount")
# The first process reaps orphans, as the first process of a host must.
_BOOT = """
mount --bind {names} /etc/hosts && hostname {name} && mount -t tmpfs tmpfs /dev/shm && ip link set lo up || exit 1
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray || exit 1
echo up; sleep infinity & wait
"""
# Replaces ssh: runs the words after the host's name on that host, without the environment of the caller.
_SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do case "$1" in -[olp]) shift 2 ;; *) shift ;; esac; done
[ -f {folder}/"$1".pid ] || {{ echo "ssh: connect to host $1: timed out" >&2; exit 255; }}
pid=$(cat {folder}/"$1".pid); shift
exec nsenter --target "$pid" --all -- env -i PATH="$PATH" HOME={folder} DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 sh -c "$*"
"""


def namespaces_work() -> bool:
    """Returns whether this user and this kernel can create hosts."""
    if os.geteuid() != 0 or not all(map(shutil.which, _TOOLS)):
        return False
    probe = "ip link add br0 type bridge && mount -t tmpfs tmpfs /mnt"
    return subprocess.run(["unshare", "-num", "sh", "-c", probe], capture_output=True).returncode == 0


needs_hosts = pytest.mark.skipif(not namespaces_work(), reason="hosts need root and Linux namespaces")


class Host:
    """One host; `pid` is the id of its first process on this machine."""

    def __init__(self, name: str, address: str, names: Path) -> None:
        self.name, self.address = name, address
        namespaces = ["--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        boot = _BOOT.format(names=names, name=name)
        self._process = subprocess.Popen(["unshare", *namespaces, "sh", "-c", boot], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline() == "up\n", f"no host {name}"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.pid = int(children)

    def command(self, *words: object) -> list[str]:
        """Returns the command that runs `words` on this host, in the caller's folder."""
        return ["nsenter", "--target", str(self.pid), "--all", f"--wd={Path.cwd()}", "--", *map(str, words)]

    def run(self, *words: object) -> str:
        done = subprocess.run(self.command(*words), capture_output=True, text=True)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def unplug(self) -> None:
        """Cuts the network of this host; its processes keep running."""
        self.run("ip", "link", "set", "eth0", "down")

    def power_off(self) -> None:
        """Kills all processes of this host."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def hosts_named(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Creates hosts on one network that know each other by name. The first one holds the switch: unplug only others.

    `folder/ssh` reaches them like ssh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate(names, start=1)}
    file = folder / "hosts"
    file.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    ssh = folder / "ssh"
    ssh.write_text(_SSH.format(folder=folder))
    ssh.chmod(0o755)
    hosts: list[Host] = []
    try:
        for name, address in addresses.items():
            hosts.append(Host(name, address, file))
            (folder / f"{name}.pid").write_text(str(hosts[-1].pid))
        first = hosts[0]
        first.run("ip", "link", "add", "eth0", "type", "bridge")
        for host in hosts[1:]:
            # `netns` takes the process id on this machine, of a process in the network of the cable's other end.
            cable = f"ip link add {host.name} type veth peer name eth0 netns {host.pid}"
            subprocess.run(["nsenter", "--target", str(first.pid), "--net", *cable.split()], check=True)
            first.run("ip", "link", "set", host.name, "master", "eth0", "up")
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            host.power_off()
