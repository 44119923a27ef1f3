"""The tracking store: its address, its database, its client with short time limits, and its faults in plain words."""

from __future__ import annotations

import contextlib
import http.client
import os
import sqlite3
import ssl
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.config import TrackingConfig, default_tracking_uri
from pipeline.core.errors import UserError
from pipeline.core.files import file_lock, fsync

if TYPE_CHECKING:  # takes seconds to import
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

_SQLITE = "sqlite:///"
_CREATION_LIMIT_S = 300.0
ANSWER_LIMIT_S = 10.0
_MAX_REASON_LENGTH = 200
# Short limits, since with the defaults one call to a dead server takes minutes.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "PGCONNECT_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """Returns the configured URI, MLFLOW_TRACKING_URI, or the URI of the sqlite file beside the output folder."""
    return config.uri or default_tracking_uri(output)


def database_path(uri: str) -> Path | None:
    """Returns the file of an sqlite URI, None for other stores."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])) if uri.startswith(_SQLITE) else None


def open_client(uri: str) -> MlflowClient:
    """Opens a client; creates the database of an sqlite URI if there is none.

    Raises:
        UserError: the database is half-made, or no database.
    """
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    path = database_path(uri)
    if path is not None:
        _create_database(path)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def require_answer(uri: str) -> None:
    """Checks that something answers at the address of a server, before MLflow is imported and retries.

    Raises:
        UserError: nothing answers within `ANSWER_LIMIT_S`.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(uri, timeout=ANSWER_LIMIT_S).close()
    except urllib.error.HTTPError:  # an answer too
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # MLflow has its own settings for certificates
            return
        fault = f"MLflow does not answer at {uri} ({reason})"
        raise UserError("tracking URI", fault, "check the address and that the server runs") from error


def _create_database(path: Path) -> None:
    """Creates a database in one step, and only once, even if several processes start at the same moment."""
    if path.is_file() and path.stat().st_size:
        _check_database(path)
        return
    with file_lock(path.with_name(f"{path.name}.lock"), _CREATION_LIMIT_S):
        if path.is_file() and path.stat().st_size:
            return  # another process has created it
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            store = SqlAlchemyStore(_SQLITE + _quoted(temporary.absolute()), _artifacts_beside(path))
            store.engine.dispose()
            fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _check_database(path: Path) -> None:
    """Refuses a database that another program began to create and did not complete."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            is_complete = {"alembic_version", "experiments", "runs"} <= tables and bool(
                database.execute("SELECT version_num FROM alembic_version").fetchall()
            )
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):  # it is in use, so it exists
            return
        raise UserError(path, f"is not an MLflow database ({error})", _move_away(path)) from error
    if not is_complete:
        raise UserError(path, "is a half-made MLflow database without runs", _move_away(path))


def _move_away(path: Path) -> str:
    return f"move it away (`mv '{path}' '{path}.broken'`): the next start creates a new one"


def artifact_location(uri: str) -> str | None:
    """Returns where a new experiment keeps artifacts: beside the database file; None leaves it to the server."""
    path = database_path(uri)
    return None if path is None else _artifacts_beside(path)


def _artifacts_beside(path: Path) -> str:
    # By default, MLflow would put artifacts into ./mlruns of the current directory.
    return (path.absolute().parent / "mlartifacts").as_uri()


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3F")


def open_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the id of an experiment, which is created if it does not exist.

    Raises:
        UserError: the experiment is deleted, or MLflow refuses its name.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri)))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another run may have created it meanwhile
            if experiment is None:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    fault = f"MLflow refuses the name '{name}' ({first_line(error)})"
                    raise UserError("tracking.experiment", fault, "choose another name") from error
                raise
    require_active(experiment.lifecycle_stage, name, experiment.experiment_id, uri)
    return str(experiment.experiment_id)


def require_active(lifecycle_stage: str, name: str, experiment_id: str, uri: str) -> None:
    """Refuses an experiment that was deleted and not purged: MLflow keeps its name and takes no runs.

    Raises:
        UserError: it is deleted.
    """
    if lifecycle_stage != "active":
        command = f"MLFLOW_TRACKING_URI='{uri}' mlflow experiments restore --experiment-id {experiment_id}"
        remedy = f"restore it (`{command}`), or choose another tracking.experiment"
        raise UserError(f"experiment '{name}'", f"is deleted in {uri}", remedy)


def describe_fault(error: Exception, uri: str) -> str:
    """Returns why a call to MLflow failed, as a sentence for the user."""
    if isinstance(error, UserError):
        return str(error)
    code = getattr(error, "error_code", None)
    if "out-of-date database schema" in str(error):
        return f"{uri} is of another version of MLflow; make a copy of it, then run `mlflow db upgrade '{uri}'`"
    if code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED"):
        return f"MLflow at {uri} refuses it: {first_line(error)}"
    return f"MLflow does not answer at {uri} ({type(error).__name__}: {first_line(error)})"


def first_line(error: Exception | MlflowException) -> str:
    """Returns the first line of an error, shortened."""
    return str(error).partition("\n")[0][:_MAX_REASON_LENGTH]
