"""YAML as JSON sees it: the core schema of YAML 1.2, no key twice, no tags of Python's.

PyYAML follows YAML 1.1, where ``5e8`` is a string, ``no`` is false and ``010`` is 8. Its
constructors also follow aliases and merges by recursion, in a time that grows without bound. So
only its parser is used, which turns a text into a flat sequence of events.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from drivetrain.plan.config.limits import MAX_DEPTH, MAX_VALUES, number_problem

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE_TAG = "tag:yaml.org,2002:"

_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[1-9][0-9]*(?=[eE]))(?:[eE][-+]?[0-9]+)?")


_MERGE = object()
"""Stands for the key ``<<`` while an object is being read."""


@dataclass
class _Mapping:
    """An object that is being read."""

    value: dict[Any, Any] = field(default_factory=dict)
    key: Any = None
    has_key: bool = False


def parse(text: str) -> Any:
    """The only document of ``text``; aliases are the same object as what they stand for.

    Raises:
        yaml.YAMLError: it is no YAML, or says what JSON cannot say.
    """
    return _Builder().build(text)


class _Builder:
    def __init__(self) -> None:
        self._open: list[_Mapping | list[Any]] = []
        self._anchors: dict[str, Any] = {}
        self._result: Any = None
        self._left = MAX_VALUES
        self._documents = 0

    def build(self, text: str) -> Any:
        for event in yaml.parse(text, Loader=_PARSER):
            if isinstance(event, DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise _error("expected a single document, but found another one", event)
            elif isinstance(event, NodeEvent):
                self._spend(1, event)
                self._node(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close(event)
        return self._result

    def _node(self, event: NodeEvent) -> None:
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise _error(f"no anchor is named {event.anchor!r}", event)
            value = self._anchors[event.anchor]
            if any(value is (f.value if isinstance(f, _Mapping) else f) for f in self._open):
                raise _error(f"{event.anchor!r} contains itself", event)
            self._add(value, event)
        elif isinstance(event, ScalarEvent):
            value = _scalar(event)
            self._name(event, value)
            self._add(value, event)
        else:
            is_mapping = isinstance(event, MappingStartEvent)
            _check_tag(event, "map" if is_mapping else "seq")
            frame: _Mapping | list[Any] = _Mapping() if is_mapping else []
            value = frame.value if isinstance(frame, _Mapping) else frame
            self._name(event, value)
            self._add(value, event)
            self._open.append(frame)
            if len(self._open) > MAX_DEPTH:
                raise _error(f"nested too deeply: more than {MAX_DEPTH} levels", event)

    def _name(self, event: Any, value: Any) -> None:
        if event.anchor is not None:
            self._anchors[event.anchor] = value

    def _add(self, value: Any, event: NodeEvent) -> None:
        """Put a value where it belongs: into the list, or under the key, that is being read."""
        frame = self._open[-1] if self._open else None
        if frame is None:
            self._result = value
        elif isinstance(frame, list):
            frame.append(value)
        elif not frame.has_key:
            if isinstance(value, (dict, list)):
                raise _error("config keys are strings, got an object or a list", event)
            is_merge = isinstance(event, ScalarEvent) and event.implicit[0] and value == "<<"
            key = _MERGE if is_merge else value
            if key in frame.value:
                raise _error(f"key {value!r} is given twice in one object", event)
            frame.key, frame.has_key = key, True
        else:
            frame.value[frame.key] = value
            frame.has_key = False

    def _close(self, event: yaml.Event) -> None:
        frame = self._open.pop()
        if isinstance(frame, list) or _MERGE not in frame.value:
            return
        given = frame.value.pop(_MERGE)
        for source in given if isinstance(given, list) else [given]:
            if not isinstance(source, dict):
                raise _error("'<<' takes in an object or a list of objects", event)
            self._spend(len(source), event)
            for key, value in source.items():
                frame.value.setdefault(key, value)

    def _spend(self, values: int, event: yaml.Event) -> None:
        # An object has a key for each value; what aliases multiply is counted later.
        self._left -= values
        if self._left < -MAX_VALUES:
            raise _error(f"more than {MAX_VALUES} values", event)


def _scalar(event: ScalarEvent) -> Any:
    text: str = event.value
    value = _resolved(text, event) if event.implicit[0] or event.tag else text
    if event.tag in (None, "!"):
        return value if event.implicit[0] else text
    kinds: dict[str, Any] = {
        "null": type(None),
        "bool": bool,
        "int": int,
        "float": (int, float),
        "str": str,
    }
    kind = event.tag.removeprefix(_CORE_TAG)
    if event.tag == kind or kind not in kinds:
        raise _error(f"the tag {event.tag!r} is not allowed", event)
    if kind == "str":
        return text
    if not isinstance(value, kinds[kind]) or (kind == "int" and isinstance(value, bool)):
        raise _error(f"{text[:40]!r} is no {kind}", event)
    return float(value) if kind == "float" else value


def _resolved(text: str, event: ScalarEvent) -> Any:
    """What a text without quotes means."""
    if problem := number_problem(text):
        raise _error(problem, event)
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _check_tag(event: Any, kind: str) -> None:
    if event.tag not in (None, "!", _CORE_TAG + kind):
        raise _error(f"the tag {event.tag!r} is not allowed here", event)


def _error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(None, None, problem, mark)
