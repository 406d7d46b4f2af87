"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from drivetrain.errors import ConfigError


def at_home(path: str | os.PathLike[str]) -> str:
    """``path`` with the home folder in place of a leading ``~``, as a shell would hand it over.

    Raises:
        ConfigError: it is the home of somebody unknown.
    """
    text = os.fspath(path)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.split("/")[0]
        raise ConfigError(
            f"{text}: {user} is no home folder here; for a folder of that name, write ./{text}"
        ) from None
