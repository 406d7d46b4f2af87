"""Find what a user names: ``MODULE:NAME``, or ``FILE.py:NAME`` of a script."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from drivetrain.errors import ConfigError


def named(path: str, option: str) -> Any:
    """What ``path`` names.

    A script is imported, not run as one: what it has under ``if __name__ == "__main__"`` is left
    out. Its folder is where its imports are looked for first, as when Python runs it.

    Args:
        path: ``MODULE:NAME`` or ``FILE.py:NAME``; ``NAME`` may have dots.
        option: what it was given with, for errors.

    Raises:
        ConfigError: there is no such thing, or the module cannot be imported; says why.
    """
    where, colon, name = path.rpartition(":")
    if not (colon and where and name):
        raise ConfigError(
            f"{option}: {path!r} names no function: expected MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    try:
        module = _script(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and where.startswith(error.name):
            raise ConfigError(
                f"{option}: no {path!r}, expected MODULE:FUNCTION or FILE.py:FUNCTION: {error}"
            ) from error
        raise ConfigError(
            f"{option}: {where} imports {error.name}, which is not installed"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{option}: {where} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError as error:
        raise ConfigError(
            f"{option}: no {path!r}, expected MODULE:FUNCTION or FILE.py:FUNCTION: {error}"
        ) from error


def _script(file: Path) -> ModuleType:
    """Import a script once, under its own name."""
    file = file.resolve()
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file.name} in {file.parent}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module
