"""`pal submit CONFIG -- COMMAND`: runs a command as a job of a Ray cluster, shows its log, ends with its exit code.
A door to Ray: the Jobs SDK alone, over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.config import load_config
from pipeline.config.loading import Strict
from pipeline.core import redact
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, UserError, run_command

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_S = 1.0

NonNegative = Annotated[float, Field(ge=0)]


class SubmitConfig(Strict):
    """A Ray cluster, and what a job takes there.

    Attributes:
        address: of the cluster's job server. A cluster that asks for a token gets that of RAY_AUTH_TOKEN or of the
            file that RAY_AUTH_TOKEN_PATH names.
        working_dir: sent to the cluster; the command runs in its copy, which ends with the job.
        exclude: of `working_dir` what is not sent, besides what git ignores there; patterns of .gitignore.
        environment: names of variables that the job gets with the values that they have here.
        num_cpus, num_gpus: of the node on which the command itself runs, 0 for the head node.
        stop_wait_s: that a stopped command has to save, before it is killed.
    """

    address: str = "http://127.0.0.1:8265"
    working_dir: Path = Path()
    exclude: list[str] = ["/.git", ".venv", "/runs", "/mlruns", "*.db"]
    environment: list[str] = []
    num_cpus: NonNegative = 0
    num_gpus: NonNegative = 0
    stop_wait_s: NonNegative = 600


def main(argv: Sequence[str]) -> int:
    arguments, command = _parse(argv)
    config = load_config(SubmitConfig, arguments.config, arguments.overrides)
    runtime_env = make_runtime_env(config, os.environ)
    entrypoint = shlex.join(command)
    if arguments.dry_run:
        shown = {**runtime_env, "env_vars": sorted(runtime_env["env_vars"])}
        print(json.dumps({"address": config.address, "entrypoint": entrypoint, "runtime_env": shown}, indent=2))
        return 0
    client = _connect(config.address)
    job_id = client.submit_job(
        entrypoint=entrypoint,
        runtime_env=runtime_env,
        entrypoint_num_cpus=config.num_cpus,
        entrypoint_num_gpus=config.num_gpus,
    )
    print(f"pal: job {job_id} on {config.address}", file=sys.stderr, flush=True)
    if arguments.no_wait:
        status, code = str(client.get_job_status(job_id)), 0
    else:
        status, code = follow(client, job_id, stop_on_interrupt=arguments.stop_on_interrupt)
    if arguments.json:
        figures = {"job_id": job_id, "status": status}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return code


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="pal submit",
        usage="pal submit CONFIG [key.sub=value ...] [options] -- COMMAND ...",
        description="Run a command as a job of a Ray cluster and show its log. Exits with the code of the command, "
        f"with {EXIT_STOPPED} when the job was stopped.",
    )
    parser.add_argument("config", help="a YAML file that names the cluster, or a shipped one (ray_job)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument("--no-wait", action="store_true", help="return when the job is submitted")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job (default: it goes on)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted; of variables the names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the job's id and status here as well")
    at = [*argv, "--"].index("--")
    arguments, command = parser.parse_intermixed_args(argv[:at]), [*argv[at + 1 :]]
    if not command:
        raise UserError("COMMAND", "is missing", "write it behind ` -- `")
    return arguments, command


def make_runtime_env(config: SubmitConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """What Ray sets up for the job.

    Raises:
        UserError: a variable is missing here or holds a secret; Ray writes what it sets up into logs and job records.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": f"{config.stop_wait_s:g}", "PYTHONUNBUFFERED": "1"}
    for name in config.environment:
        if name not in environment:
            raise UserError("environment", f"{name} is not set here", "set it, or take it off the list")
        if redact.holds_secret(name, environment[name]):
            remedy = "set it on the nodes instead, see cluster/README.md"
            raise UserError("environment", f"{name} is a secret, which Ray would write into its logs", remedy)
        variables[name] = environment[name]
    if not config.working_dir.is_dir():
        raise UserError("working_dir", f"{config.working_dir} is not a folder", "give one")
    return {"working_dir": str(config.working_dir.resolve()), "excludes": config.exclude, "env_vars": variables}


def _connect(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        remedy = "start the cluster, or open a way to it (`ray dashboard`, `kubectl port-forward`)"
        raise UserError("address", f"no job server answers at {address}", remedy) from error
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise UserError("address", f"{address} does not accept our token", remedy) from error


def follow(client: JobSubmissionClient, job_id: str, *, stop_on_interrupt: bool) -> tuple[str, int]:
    """Shows the log until the job ends, or until Ctrl-C.

    Returns:
        the job's status and our exit code.
    """
    log = _Log(client, job_id)
    try:
        log.show()
        return _wait(client, job_id)
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            print(f"pal: job {job_id} goes on; `ray job logs --follow {job_id}` shows it again", file=sys.stderr)
            raise
        print(f"pal: stopping job {job_id} (again: leave it)", file=sys.stderr, flush=True)
        client.stop_job(job_id)
        log.show()  # where it saves, and why it ends
        return _wait(client, job_id)


class _Log:
    """A job's log, of which every line is shown once though the server sends it from the beginning each time."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._secrets = redact.environment_secrets()
        self._shown = 0

    def show(self) -> None:
        """Shows what is not shown yet, until the job ends."""
        try:
            asyncio.run(self._show())
        except RuntimeError as error:
            print(f"pal: the log is cut off ({error}); waiting for the job's end", file=sys.stderr)

    async def _show(self) -> None:
        sent = 0
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._shown - sent) :]
            sent += len(text)
            print(redact.redact(new, self._secrets), end="", flush=True)
            self._shown = max(self._shown, sent)


def _wait(client: JobSubmissionClient, job_id: str) -> tuple[str, int]:
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_S)
    status = str(job.status)
    if status == "SUCCEEDED":
        return status, 0
    if status == "STOPPED":
        return status, EXIT_STOPPED
    if not job.driver_exit_code:  # it never began, or its node is gone
        print(f"pal: {job.message}", file=sys.stderr)
    return status, job.driver_exit_code or EXIT_FAILURE


if __name__ == "__main__":
    raise SystemExit(run_command(main))
