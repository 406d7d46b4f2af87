"""From a file, a dict or a string to one plain dict; and ``path=value`` overlays on top of it."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from drivetrain.errors import ConfigError
from drivetrain.wording import as_json

Config = dict[str, Any]

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")


def load_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> Config:
    """Read a config.

    Args:
        source: a dict (copied), a path to a JSON or YAML file (``.yaml``, ``.yml``), or base64-url
            encoded JSON. JSON may have comments (``//``, ``#``, ``/* */``) and trailing commas.

    Raises:
        ConfigError: the source does not exist, cannot be parsed (with file, line and column),
            repeats a key, or is no object.
    """
    if isinstance(source, Mapping):
        return _object(source, "the config")
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"a config is a dict, a path or base64-url JSON, got {type(source).__name__}"
        )
    path = Path(source)
    if isinstance(source, str) and not _is_file(path):
        decoded = _decoded(source)
        if decoded is not None:
            return _object(parse_json(decoded, "the base64 config"), "the base64 config")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    return _object((_parse_yaml if is_yaml else parse_json)(text, str(path)), str(path))


def overlay(config: Mapping[str, Any], assignments: Iterable[str]) -> Config:
    """A copy of ``config`` with ``path=value`` assignments applied in order.

    A value is JSON where it parses as such, else a string; sections on the way are created.

    Raises:
        ConfigError: an assignment has no ``=`` or no path, or leads through a value that is no
            section.
    """
    result: Config = _plain(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise ConfigError(
                f"overlay {assignment!r} is not of the form path=value, "
                "e.g. zero_optimization.stage=2"
            )
        section = result
        for depth, key in enumerate(keys[:-1], 1):
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    f"overlay {assignment!r} cannot be applied: {'.'.join(keys[:depth])} is "
                    f"{as_json(section)}, not a section"
                )
        try:
            section[keys[-1]] = parse_json(text, f"overlay {path}")
        except ConfigError:
            section[keys[-1]] = text
    return result


def parse_json(text: str, name: str) -> Any:
    """Parse JSON with comments and trailing commas; ``name`` is what messages call the source."""

    def constant(word: str) -> NoReturn:
        line = text[: text.index(word)].count("\n") + 1
        raise ConfigError(f"{name}, line {line}: {word} is no JSON number")

    def pairs(items: list[tuple[str, Any]]) -> Config:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            key = next(key for key in keys if keys.count(key) > 1)
            written = re.finditer(re.escape(json.dumps(key)) + r"\s*:", text)
            lines = ", ".join(str(text[: match.start()].count("\n") + 1) for match in written)
            raise ConfigError(
                f"{name}: key {key!r} is given twice in one object (it stands on lines {lines}); "
                "remove one"
            )
        return found

    # Blanks instead of comments and commas keep the line and column of everything else.
    stripped = _TRAILING_COMMA.sub(_blank(","), _COMMENT.sub(_blank("/#"), text))
    try:
        return json.loads(stripped, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise _syntax_error(
            name, text, error.lineno, error.colno, error.msg.removesuffix(" at")
        ) from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply") from None


def _blank(starts: str) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        found = match.group()
        return re.sub(r"[^\n]", " ", found) if found[0] in starts else found

    return replace


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    from drivetrain.config.strict_yaml import StrictLoader

    try:
        return StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "malformed YAML"
        if mark is None:
            raise ConfigError(f"{name}: {problem}") from None
        raise _syntax_error(name, text, mark.line + 1, mark.column + 1, problem) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {error}") from None


def _syntax_error(name: str, text: str, line: int, column: int, problem: str) -> ConfigError:
    lines = text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1]
    start = max(0, column - 60)
    excerpt = shown[start : start + 80].replace("\t", " ")
    return ConfigError(
        f"{name}, line {line}, column {column}: {problem[0].lower()}{problem[1:]}\n"
        f"    {excerpt}\n    {' ' * (column - 1 - start)}^"
    )


def _object(value: Any, name: str) -> Config:
    if not isinstance(value, Mapping):
        kind = "empty" if value is None else as_json(value)
        raise ConfigError(f"{name} must hold one object with config keys, but is {kind}")
    plain: Config = _plain(value)
    return plain


def _plain(value: Any, path: str = "") -> Any:
    """A deep copy made of plain dicts and lists, with string keys only."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                where = f" in {path}" if path else ""
                raise ConfigError(f"config keys are strings, got {key!r}{where}")
        return {key: _plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, path) for item in value]
    return value


def _is_file(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long base64 string is no possible file name
        return False


def _decoded(text: str) -> str | None:
    """The JSON object in a base64-url string, or ``None`` when it holds none."""
    try:
        padded = text + "=" * (-len(text) % 4)
        decoded = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None
