"""YAML as JSON sees it: the core schema of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where ``5e8`` is a string, ``no`` is false and ``010`` is 8.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError


class StrictLoader(yaml.SafeLoader):
    """Loads what JSON could have said."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - declared by the base class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise ConstructorError(
                    None, None, f"key {key!r} is given twice in one object", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: list[str]) -> None:
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


_resolve("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""])
_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_resolve("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789"))
_resolve(
    "float",
    r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[1-9][0-9]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
    list("-+.0123456789"),
)
_resolve("merge", r"^<<$", ["<"])
