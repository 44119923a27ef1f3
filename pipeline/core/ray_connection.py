"""Connects this process to a Ray cluster: refuses one that does not answer, and keeps workers to installed modules."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError

CONNECT_TIMEOUT_S = 10.0
_REMEDY = "start the cluster, or correct the address or remove it"
# The first bytes of every gRPC connection: the HTTP/2 preface and empty settings. A server answers with its settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_FRAME = 4


def connect(where: str, address: str, **options: Any) -> None:
    """Makes this process a driver of a cluster.

    By default Ray puts the driver's current folder in front of the modules of all workers, so that a file `random.py`
    or a folder `pipeline` of the user would replace the installed one there. Here workers keep to what is installed.

    Args:
        where: the setting that holds the address, for the error message.
        address: `host:port`, `ray://host:port`, `auto`, or `local` for a new cluster.
        options: further options of `ray.init`.

    Raises:
        UserError: nothing answers at the address as a Ray cluster, or it rejects our token or versions.
    """
    require_answer(where, address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_config import JobConfig

    if "://" not in address:  # a Ray client has no folder on the cluster
        options["job_config"] = job = JobConfig()
        # Ray skips the current folder for jobs that send a folder of their own.
        job._runtime_env_has_working_dir = lambda: True
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (OSError, AuthenticationError) as error:
        remedy = f"{_REMEDY}; a token belongs in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
        raise UserError(where, f"no cluster at '{address}' accepts our token", remedy) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        fault = f"the cluster at '{address}' has other versions ({' '.join(str(error).split())})"
        raise UserError(where, fault, "install the same Ray and Python here and there") from error


def require_answer(where: str, address: str) -> None:
    """Checks that a Ray server answers at the address; Ray itself would retry for minutes and then kill the process.

    Raises:
        UserError: nothing answers there within `CONNECT_TIMEOUT_S`, or something else does.
    """
    target = _current_cluster() if address == "auto" else address.removeprefix("ray://").rstrip("/")
    if not target or target == "local" or "://" in target:
        return
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(where, f"'{address}' is not an address of a Ray cluster", "write host:port, or `auto`")
    fault = f"no cluster answers at '{address}'" + (f" ({target})" if address == "auto" else "")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):  # the greeting would have to be encrypted
                return
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except OSError as error:
        raise UserError(where, f"{fault}: {error.strerror or error}", _REMEDY) from error
    if len(answer) < 4 or answer[3] != _SETTINGS_FRAME:
        raise UserError(where, f"{fault}: another program listens there", _REMEDY)


def _current_cluster() -> str:
    """Returns the address of the cluster that was last started on this machine, as Ray recorded it; empty if none."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return os.environ.get("RAY_ADDRESS", "") or (file.read_text(encoding="utf-8").strip() if file.is_file() else "")
