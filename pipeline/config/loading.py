"""Reads a typed, strict config: `base:` file < YAML < `key.sub=value` overrides. Owns every error a config file can
have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.core.errors import UserError, nearest
from pipeline.core.records import Strict


class InvalidConfig(ValueError):
    """Carries a `UserError` out of a validator: pydantic forwards only ValueErrors."""

    def __init__(self, where: str, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.user_error = UserError(where, fault, remedy)


ConfigT = TypeVar("ConfigT", bound=Strict)


def load_config(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads and validates one config file.

    Args:
        kind: the tree's root class.
        path: a YAML file, or the bare name of a config shipped in `pipeline/configs/`.
        overrides: `key.sub=value` strings; each value is read as YAML.

    A file may begin with `base: NAME`, another file beside it or a shipped one: what it says is then laid over that.

    Raises:
        UserError: missing file, YAML syntax, unknown key, wrong type or value, malformed override.
    """
    path = shipped_config(path)
    values = _read_on_base(path, ())
    for override in overrides:
        _apply_override(values, override)
    return validate_config(kind, values, str(path))


def shipped_config(path: str | Path) -> Path:
    """The file itself, or the shipped config of that name."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = Path(__file__).parent.parent / "configs"
    named = shipped / given.with_suffix(".yaml").name
    if given.parent == Path() and named.is_file():
        return named
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise UserError(path, "no such config file", f"give a YAML file or a shipped config ({', '.join(names)})")


def _read_on_base(path: Path, over: tuple[Path, ...]) -> dict[str, Any]:
    if path in over:
        raise UserError(path, "is its own base", "remove this `base:`")
    values = read_yaml(path)
    if "base" not in values:
        return values
    base = str(values.pop("base"))
    beside = path.parent / base
    return merge(_read_on_base(beside if beside.is_file() else shipped_config(base), (*over, path)), values)


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `values`: mappings key by key, everything else replaced."""
    merged = dict(values)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is written twice in one mapping, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: unreadable, not YAML, not a mapping, or a key that is there twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read ({error})", "give a readable UTF-8 YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(place, f"YAML syntax error ({problem})", "correct the file at this place") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(path, f"holds a {type(values).__name__}", "write a mapping of keys to values")
    return values


def validate_config(kind: type[ConfigT], values: dict[str, Any], source: str) -> ConfigT:
    """Validates plain values into a tree; the first error becomes one `UserError` that names its key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_error(kind, error.errors(), source) from error


def dump_config(config: Strict) -> str:
    """The resolved tree as YAML, keys in the order of their declaration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override '{override}'", "is not of the form key.sub=value", "write for example train.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}'", "its value is not YAML", "quote the value") from error
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}'", f"'{part}' holds a value, not keys", "check the key")
        node = child
    node[parts[-1]] = value


def _first_error(kind: type[BaseModel], errors: list[ErrorDetails], source: str) -> UserError:
    # An unknown key explains the "missing key" that a misspelling also causes, so it is told first.
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
    return UserError(f"{source}: {key}", f"{message}, got {error['input']!r}", "correct this value")


def _at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The keys that a user wrote on the way to an error, without pydantic's tags of unions; and those known there."""
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
    """Without what `Annotated` adds, and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    others = [argument for argument in get_args(annotation) if argument is not type(None)]
    return _bare(others[0]) if len(others) == 1 and len(get_args(annotation)) == 2 else annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
