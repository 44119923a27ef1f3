"""Reads and writes YAML 1.2. PyYAML alone reads YAML 1.1: 1:30 as 90, 010 as 8, `no` as false and 1e-4 as text."""

from __future__ import annotations

import re
from typing import Any

import yaml

INT = re.compile(r"[-+]?[0-9]+$|0x[0-9a-fA-F]+$")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"(~|null|Null|NULL|)$")
MERGE = re.compile(r"<<$")
# An integer matches FLOAT as well; the first match counts.
_SCALARS = {"null": NULL, "bool": BOOL, "int": INT, "float": FLOAT, "merge": MERGE}
_RESOLVERS = [(f"tag:yaml.org,2002:{name}", pattern) for name, pattern in _SCALARS.items()]


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does and rejects a repeated key, of which PyYAML would silently keep the last one."""

    # By the first character of a scalar; None holds for all.
    yaml_implicit_resolvers = {None: _RESOLVERS}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is repeated", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Returns a decimal (also with leading zeros) or hexadecimal integer."""
        return int(node.value, 16 if node.value.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 reads as something else."""


for _tag, _pattern in _RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Parses one YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping repeats a key.
    """
    return yaml.load(text, _Loader)


def dump_yaml(values: Any) -> str:
    """Returns plain values as YAML, with keys in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
