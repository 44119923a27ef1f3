"""`pal submit CONFIG -- COMMAND`: runs a command as a job of a Ray cluster, shows its log and returns its exit code.

Uses only Ray's Jobs SDK, over HTTP."""

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
from pipeline.core import redact
from pipeline.core.arguments import add_config, add_dry_run, add_json, write_results
from pipeline.core.console import logger
from pipeline.core.errors import EXIT_FAILURE, EXIT_STOPPED, UserError, run_command
from pipeline.core.records import Strict

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_S = 1.0

NonNegative = Annotated[float, Field(ge=0)]


class SubmitConfig(Strict):
    """A Ray cluster, and the resources and environment of a job on it.

    Attributes:
        address: address of the cluster's job server. A cluster that requires a token receives that of RAY_AUTH_TOKEN or
            of the file named by RAY_AUTH_TOKEN_PATH.
        working_dir: folder that is sent to the cluster; the command runs in the copy, which is removed after the job.
        exclude: patterns in the syntax of .gitignore for files of `working_dir` that are not sent, in addition to those
            that git ignores.
        environment: names of variables that are passed to the job with their values on this machine.
        num_cpus, num_gpus: resources reserved for the command itself; with 0 of both, it runs on the head node.
        stop_wait_s: how long a stopped command may take to save before it is killed.
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
        printable = {**runtime_env, "env_vars": sorted(runtime_env["env_vars"])}
        print(json.dumps({"address": config.address, "entrypoint": entrypoint, "runtime_env": printable}, indent=2))
        return 0
    client = _connect(config.address)
    job_id = client.submit_job(
        entrypoint=entrypoint,
        runtime_env=runtime_env,
        entrypoint_num_cpus=config.num_cpus,
        entrypoint_num_gpus=config.num_gpus,
    )
    logger.info("job %s on %s", job_id, config.address)
    if arguments.no_wait:
        status, code = str(client.get_job_status(job_id)), 0
    else:
        status, code = follow(client, job_id, stop_on_interrupt=arguments.stop_on_interrupt)
    write_results({"job_id": job_id, "status": status}, arguments.json)
    return code


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="pal submit",
        usage="pal submit CONFIG [key.sub=value ...] [options] -- COMMAND ...",
        description="Run a command as a job of a Ray cluster and show its log. CONFIG describes the cluster (shipped: "
        f"ray_job). Exits with the code of the command, or with code {EXIT_STOPPED} if the job was stopped.",
    )
    add_config(parser)
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is submitted")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job (default: it continues)")
    add_dry_run(parser, "print what would be submitted, with the names of variables but not their values")
    add_json(parser)
    separator = [*argv, "--"].index("--")
    arguments, command = parser.parse_intermixed_args(argv[:separator]), [*argv[separator + 1 :]]
    if not command:
        raise UserError("COMMAND", "is missing", "write it after ` -- `")
    return arguments, command


def make_runtime_env(config: SubmitConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the runtime environment of the job, as Ray expects it.

    Raises:
        UserError: a variable is not set or holds a secret, which Ray would write to logs and job records.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": f"{config.stop_wait_s:g}", "PYTHONUNBUFFERED": "1"}
    for name in config.environment:
        if name not in environment:
            raise UserError("environment", f"{name} is not set on this machine", "set it, or remove it from the list")
        if redact.holds_secret(name, environment[name]):
            remedy = "set it on the nodes instead; see cluster/README.md"
            raise UserError("environment", f"{name} holds a secret, which Ray would write to its logs", remedy)
        variables[name] = environment[name]
    if not config.working_dir.is_dir():
        raise UserError("working_dir", f"{config.working_dir} is not a folder", "give an existing folder")
    _require_no_shadows(config)
    return {"working_dir": str(config.working_dir.resolve()), "excludes": config.exclude, "env_vars": variables}


def _require_no_shadows(config: SubmitConfig) -> None:
    """Refuses a working_dir whose files would replace installed modules: Ray puts the copy in front of all modules.

    Raises:
        UserError: it holds a module that is named like one of Python's or of ours, and is another one.
    """
    commands = {"pipeline": "cli.py", "data_prep": "prepare.py"}  # file by which a checkout of ours is recognized
    excluded = {pattern.strip("/") for pattern in config.exclude}
    for entry in sorted(config.working_dir.resolve().iterdir()):
        is_package = entry.is_dir() and (entry / "__init__.py").is_file()
        if not (is_package or entry.suffix == ".py") or entry.name in excluded:
            continue
        is_foreign = entry.stem in commands and not (entry / commands[entry.stem]).is_file()
        if is_foreign or entry.stem in sys.stdlib_module_names:
            fault = f"{config.working_dir} holds {entry.name}, which would replace the module {entry.stem} in the job"
            raise UserError("working_dir", fault, f"rename it, or add /{entry.name} to exclude")


def _connect(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        remedy = "start the cluster, or forward its port (`ray dashboard`, `kubectl port-forward`)"
        raise UserError("address", f"no job server answers at {address}", remedy) from error
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise UserError("address", f"{address} rejects our token", remedy) from error


def follow(client: JobSubmissionClient, job_id: str, *, stop_on_interrupt: bool) -> tuple[str, int]:
    """Shows the log until the job ends or the user presses Ctrl-C.

    Returns:
        the status of the job and the exit code of this command.
    """
    log = _Log(client, job_id)
    try:
        log.show()
        return _wait(client, job_id)
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            logger.info("job %s continues; `ray job logs --follow %s` shows its log", job_id, job_id)
            raise
        logger.info("stopping job %s (press Ctrl-C again to stop waiting for it)", job_id)
        client.stop_job(job_id)
        log.show()  # it says where the job saves and why it ends
        return _wait(client, job_id)


class _Log:
    """The log of a job. Shows every line once, although the server sends the log from the beginning each time."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._secrets = redact.environment_secrets()
        self._shown = 0

    def show(self) -> None:
        """Shows the part that has not been shown yet, until the job ends."""
        try:
            asyncio.run(self._show())
        except RuntimeError as error:
            logger.warning("the log is interrupted (%s); waiting for the end of the job", error)

    async def _show(self) -> None:
        sent = 0
        async for text in self._client.tail_job_logs(self._job_id):
            unseen = text[max(0, self._shown - sent) :]
            sent += len(text)
            print(redact.redact(unseen, self._secrets), end="", flush=True)
            self._shown = max(self._shown, sent)


def _wait(client: JobSubmissionClient, job_id: str) -> tuple[str, int]:
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_S)
    status = str(job.status)
    if status == "SUCCEEDED":
        return status, 0
    if status == "STOPPED":
        return status, EXIT_STOPPED
    if not job.driver_exit_code:  # it never started, or its node is gone
        logger.error(job.message)
    return status, job.driver_exit_code or EXIT_FAILURE


if __name__ == "__main__":
    raise SystemExit(run_command(main))
