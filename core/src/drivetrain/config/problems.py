"""pydantic's findings in our words: config path, what was expected, what was given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

from drivetrain.wording import as_json, did_you_mean

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a string",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
    "tuple_type": "a list",
}


def describe(
    error: ValidationError,
    model: type[BaseModel],
    path: str,
    value: Any,
    siblings: Sequence[str] = (),
) -> list[str]:
    """One sentence per config path that is wrong.

    Args:
        error: what ``model`` raised.
        model: the section's model.
        path: the section's config path.
        value: the section as it was given.
        siblings: keys that other plugins own inside the section, for suggestions.
    """
    expected: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    sentences: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        where, models = _locate(detail["loc"], model, value)
        full = path + where
        if detail["type"] == "extra_forbidden":
            names = [*_names(models), *(siblings if where.count(".") == 1 else ())]
            sentences[full] = "unknown key" + did_you_mean(str(detail["loc"][-1]), names)
        elif detail["type"] == "missing":
            sentences[full] = "required, but not given"
        else:
            phrase = _expectation(detail)
            if phrase is None:
                sentences[full] = _lower(detail["msg"].removeprefix("Value error, "))
            elif phrase not in expected.setdefault(full, []):
                expected[full].append(phrase)
                given[full] = detail["input"]
    for full, phrases in expected.items():
        choices = re.findall(r"'([^']*)'", " ".join(phrases))
        hint = did_you_mean(given[full], choices) if isinstance(given[full], str) else ""
        sentence = f"expected {' or '.join(phrases)}, got {as_json(given[full])}{hint}"
        sentences.setdefault(full, sentence)
    return [f"{full}: {sentence}" for full, sentence in sentences.items()]


def _expectation(detail: ErrorDetails) -> str | None:
    """What would have been right, or ``None`` when the message is a sentence of its own."""
    if detail["type"] in _EXPECTED:
        return _EXPECTED[detail["type"]].format(**detail.get("ctx", {}))
    message = detail["msg"].removeprefix("Value error, ")
    match = re.fullmatch(r"expected (.*), got .*", message, re.DOTALL)
    return match.group(1) if match else None


def _locate(
    location: Sequence[int | str], model: type[BaseModel], value: Any
) -> tuple[str, list[Any]]:
    """The config path of a location inside a section, and the types around its last key.

    pydantic puts the names of union members between the keys; what is no key of the value and not
    the last item is such a name.
    """
    path = ""
    around: list[Any] = [model]
    types: list[Any] = [model]
    for depth, item in enumerate(location, 1):
        if isinstance(value, Mapping) and (item in value or depth == len(location)):
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
        for name, field in annotation.model_fields.items():
            if key in (name, field.alias):
                yield from _members(field.annotation)
        if issubclass(annotation, RootModel):
            for member in _members(annotation.model_fields["root"].annotation):
                yield from _inner(member, key)
    elif get_origin(annotation) in (dict, Mapping) or key is None:
        for argument in get_args(annotation)[-1:]:
            yield from _members(argument)


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, without ``Annotated``."""
    if get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    elif hasattr(annotation, "__metadata__"):
        yield from _members(get_args(annotation)[0])
    else:
        yield annotation


def _names(types: Sequence[Any]) -> Iterator[str]:
    """Every key that the models among ``types`` accept."""
    for annotation in types:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, field in annotation.model_fields.items():
                yield field.alias or name


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
