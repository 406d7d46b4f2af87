"""From a file, a dict or a string to one plain dict; and ``path=value`` overlays on top of it."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.paths import at_home
from drivetrain.plan.config.json_text import parse_json, syntax_error
from drivetrain.plan.config.limits import MAX_BYTES, plain
from drivetrain.wording import as_json, printable

Config = dict[str, Any]


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
    if isinstance(source, str) and not _exists(source):
        decoded = _decoded(source)
        if decoded is not None:
            return _object(parse_json(decoded, "the base64 config"), "the base64 config")
    path = Path(at_home(source))
    name = _shown(path)
    text = _text(path, f"config file {name!r}")
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    return _object((_parse_yaml if is_yaml else parse_json)(text, name), name)


def overlay(config: Mapping[str, Any], assignments: Iterable[str]) -> Config:
    """A copy of ``config`` with ``path=value`` assignments applied in order.

    A value is JSON where it parses as such, else a string; sections on the way are created.

    Raises:
        ConfigError: an assignment has no ``=`` or no path, or leads through a value that is no
            section.
    """
    result = _object(config, "the config")
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
    return _object(result, "the config with its overlays")


def _text(path: Path, what: str) -> str:
    """The text of a file that is a file and not too large."""
    try:
        # A pipe that nobody writes to would be awaited for ever, here and by a read.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{what} is no regular file")
        with open(path, "rb", opener=_without_waiting) as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{what} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"{what} cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{what} is larger than {MAX_BYTES >> 10} KiB, which no config is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise ConfigError(f"{what} is not UTF-8 text: it has NUL bytes, as UTF-16 has")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    from drivetrain.plan.config.strict_yaml import parse

    try:
        return parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "malformed YAML"
        if mark is None:
            raise ConfigError(f"{name}: {problem}") from None
        raise syntax_error(name, text, mark.line + 1, mark.column + 1, problem) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {' '.join(str(error).split())}") from None


def _object(value: Any, name: str) -> Config:
    if isinstance(value, Mapping):
        copied: Config = plain(value, name)
        return copied
    kind = "empty" if value is None else as_json(plain(value, name))
    raise ConfigError(f"{name} must hold one object with config keys, but is {kind}")


def _shown(path: Path) -> str:
    text = printable(str(path))
    return text if len(text) <= 200 else f"{text[:100]}...{text[-80:]}"


def _exists(path: str) -> bool:
    try:
        return Path(at_home(path)).exists()
    except (OSError, ValueError):  # a long base64 string is no possible file name
        return False


def _decoded(text: str) -> str | None:
    """The JSON object in a base64-url string, or ``None`` when it holds none."""
    if len(text) > 2 * MAX_BYTES:
        return None
    try:
        padded = text + "=" * (-len(text) % 4)
        decoded = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None
