"""Reads a typed, strict config: `base:` file < YAML < `key.sub=value` overrides; names the key of the first error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.yaml_text import dump_yaml, parse_yaml
from pipeline.core.errors import UserError, nearest
from pipeline.core.records import Strict


class InvalidConfig(ValueError):
    """Carries a `UserError` out of a validator, because pydantic forwards only ValueErrors."""

    def __init__(self, where: str, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.user_error = UserError(where, fault, remedy)


ConfigT = TypeVar("ConfigT", bound=Strict)


def load_config(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads and validates one config file.

    A file may contain `base: NAME`, which names another file beside it or a shipped config; its own settings then
    override those of the base.

    Args:
        kind: root class of the config tree.
        path: a YAML file, or the bare name of a config shipped in `pipeline/configs/`.
        overrides: `key.sub=value` strings; each value is parsed as YAML.

    Raises:
        UserError: missing file, YAML syntax error, unknown key, wrong type or value, malformed override.
    """
    path = shipped_config(path)
    values = _read_on_base(path, ())
    for override in overrides:
        _apply_override(values, override)
    return validate_config(kind, values, str(path))


def shipped_config(path: str | Path) -> Path:
    """Returns the file itself, or the shipped config with that name.

    Raises:
        UserError: there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    folder = Path(__file__).parent.parent / "configs"
    shipped = folder / file.with_suffix(".yaml").name
    if file.parent == Path() and shipped.is_file():
        return shipped
    names = sorted(other.stem for other in folder.glob("*.yaml"))
    raise UserError(path, "no such config file", f"give a YAML file or a shipped config ({', '.join(names)})")


def _read_on_base(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """Returns the values of a file over those of its base; `derived` holds the files that lead to this one."""
    if path in derived:
        raise UserError(path, "is its own base", "remove this `base:`")
    values = read_yaml(path)
    if "base" not in values:
        return values
    base = str(values.pop("base"))
    beside = path.parent / base
    return merge(_read_on_base(beside if beside.is_file() else shipped_config(base), (*derived, path)), values)


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` with `overrides` applied: mappings are merged key by key, everything else is replaced."""
    merged = dict(values)
    for key, value in overrides.items():
        previous = merged.get(key)
        merged[key] = merge(previous, value) if isinstance(previous, dict) and isinstance(value, dict) else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping from a file.

    Raises:
        UserError: the file is unreadable, is not YAML, is not a mapping, or repeats a key.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read ({error})", "give a readable UTF-8 YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(where, f"YAML syntax error ({problem})", "correct the file there") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(path, f"holds a {type(values).__name__}", "write a mapping of keys to values")
    return values


def validate_config(kind: type[ConfigT], values: dict[str, Any], source: str) -> ConfigT:
    """Validates plain values into a config tree.

    Raises:
        UserError: a value is invalid; the message names the key of the first error.
    """
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise _first_error(kind, error.errors(), source) from error
    _check_numbers(config, values, source, "")
    return config


def dump_config(config: Strict) -> str:
    """Returns the resolved tree as YAML, with keys in the order of their declaration."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override '{override}'", "is not of the form key.sub=value", "write for example train.seed=1")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be parsed"
        fault = f"the value is not YAML ({problem})"
        raise UserError(f"override '{override}'", fault, "correct the value, or put it in quotes") from error
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}'", f"'{part}' is a value without keys of its own", "check the key")
        node = child
    node[parts[-1]] = value


def _check_numbers(value: Any, given: Any, source: str, key: str) -> None:
    """Checks that numbers are finite and were not given as `true` or `false`, which pydantic reads as 1 and 0."""
    if isinstance(value, BaseModel | dict):
        items = value if isinstance(value, dict) else {name: getattr(value, name) for name in value.model_fields_set}
        values = given if isinstance(given, dict) else {}
        for name, child in items.items():
            _check_numbers(child, values.get(name), source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        elements = given if isinstance(given, list) and len(given) == len(value) else [None] * len(value)
        for index, child in enumerate(value):
            _check_numbers(child, elements[index], source, f"{key}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key}", f"{given!r} is not a finite number", "give a finite number")
    elif isinstance(given, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        raise UserError(f"{source}: {key}", f"is a number, got {str(given).lower()}", "give a number")


def _first_error(kind: type[BaseModel], errors: list[ErrorDetails], source: str) -> UserError:
    # A misspelled key causes both an unknown and a missing key; the unknown one explains the other.
    error = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    written, _ = _at(kind, error["loc"])
    key = ".".join(written) or source
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InvalidConfig):
        return UserError(f"{source}: {cause.user_error.where}", cause.user_error.fault, cause.user_error.remedy)
    if error["type"] == "extra_forbidden":
        _, known = _at(kind, error["loc"][:-1])
        return UserError(
            f"{source}: {key}",
            f"unknown key (value {error['input']!r})",
            nearest(str(error["loc"][-1]), known),
        )
    if error["type"] == "missing":
        return UserError(f"{source}: {key}", "is missing", "add this key")
    message = error["msg"].removeprefix("Value error, ")
    is_unquoted = error["type"] == "string_type" and isinstance(error["input"], bool | int | float)
    remedy = "put this value in quotes" if is_unquoted else "correct this value"
    return UserError(f"{source}: {key}", f"{message}, got {error['input']!r}", remedy)


def _at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Returns the keys on the path to an error, as the user wrote them, and the keys known there.

    pydantic's own path also contains tags of unions, which are no keys.
    """
    written: list[str] = []
    annotation: Any = kind
    for part in loc:
        annotation = _bare(annotation)
        models = _models_in(annotation)
        if get_origin(annotation) in (dict, list):
            written.append(str(part))
            annotation = get_args(annotation)[-1]
        elif len(models) > 1 and get_origin(annotation) is not None:
            annotation = next((m for m in models if part in get_args(m.model_fields["kind"].annotation)), None)
        elif models:
            written.append(str(part))
            field = models[0].model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif isinstance(part, int):
            written.append(str(part))
    models = _models_in(annotation)
    return written, list(models[0].model_fields) if models else []


def _bare(annotation: Any) -> Any:
    """Returns the type without `Annotated` and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    return _bare(arguments[0]) if len(arguments) == 1 and len(get_args(annotation)) == 2 else annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
