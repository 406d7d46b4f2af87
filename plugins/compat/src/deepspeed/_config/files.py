"""Reading a config wherever a script keeps it, also in the lenient JSON that DeepSpeed reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.plan.config.loading import load_config

ConfigSource = Mapping[str, Any] | str | os.PathLike[str]


def read_config(source: ConfigSource) -> dict[str, Any]:
    """Read a config; see :func:`drivetrain.plan.config.loading.load_config`.

    A file that is no JSON is read as Hjson (https://hjson.github.io), as DeepSpeed reads every one,
    where the package ``hjson`` is installed.

    Raises:
        ConfigError: as for ``load_config``; what is wrong with a file is told as of JSON.
    """
    try:
        return load_config(source)
    except ConfigError as error:
        found = None if isinstance(source, Mapping) else _hjson(source)
        if found is None:
            raise
        if not isinstance(found, dict):
            raise error from None
        return found


def _hjson(source: str | os.PathLike[str]) -> Any | None:
    """What a file says as Hjson; ``None`` if it is none, or nothing here can read it."""
    path = Path(source)
    try:
        text = path.read_text("utf-8") if path.is_file() else None
        hjson = import_module("hjson")
    except (ImportError, OSError, ValueError):
        return None
    if text is None or path.suffix.lower() in (".yaml", ".yml"):
        return None
    from deepspeed._config.sections import dict_raise_error_on_duplicate_keys

    try:
        return hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except hjson.HjsonDecodeError:
        return None
