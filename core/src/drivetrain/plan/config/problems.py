"""pydantic's findings in our words: config path, what was expected, what was given."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

from drivetrain.contracts.plugin.section import Section
from drivetrain.wording import as_json, did_you_mean

MOST = 20
"""Problems of one kind that are told one by one; each takes a search for a suggestion."""

_EXPECTED = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    "dict_type": "an object",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
    "tuple_type": "a list",
}


def describe(
    error: ValidationError,
    model: type[BaseModel],
    path: str,
    value: Any,
    siblings: Sequence[str] = (),
    autos: Collection[str] = (),
) -> list[str]:
    """One sentence per config path that is wrong.

    Args:
        error: what ``model`` raised.
        model: the section's model.
        path: the section's config path.
        value: the section as it was given.
        siblings: keys that other plugins own inside the section, for suggestions.
        autos: config paths whose value ``"auto"`` was left out.
    """
    sentences: dict[str, str] = {}
    expected: dict[str, dict[str, Any]] = {}
    details = error.errors(include_url=False)
    for detail in details[:MOST]:
        where, models = _locate(detail, model, value)
        full = path + where
        if detail["type"] == "extra_forbidden":
            names = [*_names(models), *(siblings if len(detail["loc"]) == 1 else ())]
            sentences[full] = "unknown key" + did_you_mean(str(detail["loc"][-1]), names)
        elif detail["type"] == "missing":
            given = '"auto", which counts as unset' if full in autos else "not given"
            sentences[full] = f"required, but {given}"
        elif phrase := _expectation(detail):
            expected.setdefault(full, {})[phrase] = detail["input"]
        else:
            sentences[full] = detail["msg"].removeprefix("Value error, ")
    for full, phrases in expected.items():
        choice = " or ".join(phrases)
        given = next(iter(phrases.values()))
        words = re.findall(r"'([^']*)'", choice)
        hint = did_you_mean(given, words) if isinstance(given, str) else ""
        sentences.setdefault(full, f"expected {choice}, got {as_json(given)}{hint}")
    left = len(details) - MOST
    more = [f"{path}: and {left} more problems"] if left > 0 else []
    return [*(f"{full}: {sentence}" for full, sentence in sentences.items()), *more]


def without_autos(value: Any, models: Sequence[Any], path: str) -> tuple[Any, list[str]]:
    """A copy of a section without the keys that say ``"auto"``, and their config paths.

    Only keys that a model knows may say so: an unknown key stays, to be refused like any other.

    Args:
        value: the section, or a part of it.
        models: types that it may have.
        path: its config path.
    """
    autos: list[str] = []

    def copy(item: Any, types: Sequence[Any], where: str) -> Any:
        if isinstance(item, list):
            inner = [found for t in types for found in _inner(t, None)]
            return [copy(part, inner, f"{where}[{at}]") for at, part in enumerate(item)]
        if not isinstance(item, Mapping):
            return item
        kept = {}
        for key, part in item.items():
            below = f"{where}.{key}"
            if isinstance(part, str) and part == "auto" and _knows(types, key):
                autos.append(below)
            else:
                kept[key] = copy(part, [found for t in types for found in _inner(t, key)], below)
        return kept

    return copy(value, models, path), autos


def _knows(types: Sequence[Any], key: str) -> bool:
    other_names = (n for t in types if _is_section(t) for n in t.renamed)
    return key in {*_names(types), *other_names}


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _expectation(detail: ErrorDetails) -> str | None:
    """What would have been right, or ``None`` when the message is a sentence of its own."""
    if detail["type"] in _EXPECTED:
        return _EXPECTED[detail["type"]].format(**detail.get("ctx", {}))
    match = re.match(r"(?:Value error, expected|Input should be) (.*?)(, got |$)", detail["msg"])
    return match.group(1) if match else None


def _locate(detail: ErrorDetails, model: type[BaseModel], value: Any) -> tuple[str, list[Any]]:
    """The config path of a finding inside a section, and the types around its last key.

    Between the keys pydantic puts the names of union members; these are no keys of the value.
    """
    path = ""
    around: list[Any] = [model]
    types: list[Any] = [model]
    absent = len(detail["loc"]) if detail["type"] == "missing" else 0
    for depth, item in enumerate(detail["loc"], 1):
        if isinstance(value, Mapping) and item not in value:  # given by another name, perhaps
            names = (pair for t in types if _is_section(t) for pair in t.renamed.items())
            item = next((old for old, name in names if name == item and old in value), item)
        if isinstance(value, Mapping) and (item in value or depth == absent):
            path += f".{item}"
            around, types = types, [found for t in types for found in _inner(t, str(item))]
            value = value.get(item)
        elif isinstance(value, (list, tuple)) and isinstance(item, int) and item < len(value):
            path += f"[{item}]"
            types = [found for t in types for found in _inner(t, None)]
            value = value[item]
    return path, around


def _inner(annotation: Any, key: str | None) -> Iterator[Any]:
    """Types of what ``annotation`` holds under ``key``, or as the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        root = annotation.model_fields.get("root")
        if issubclass(annotation, RootModel) and root is not None:
            for member in _members(root.annotation):
                yield from _inner(member, key)
        for name, field in annotation.model_fields.items():
            if key in (name, field.alias) or _renamed(annotation, key) == name:
                yield from _members(field.annotation)
    elif arguments := get_args(annotation):
        yield from _members(arguments[0 if key is None else -1])


def _renamed(annotation: type[BaseModel], key: str | None) -> str | None:
    names = annotation.renamed if issubclass(annotation, Section) else {}
    return None if key is None else names.get(key)


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, without ``Annotated``."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _names(types: Sequence[Any]) -> Iterator[str]:
    """Every key that the models among ``types`` accept."""
    for annotation in types:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, field in annotation.model_fields.items():
                yield field.alias or name
