"""Adapters in a folder, each in one below it by its name."""

from __future__ import annotations

import re
from pathlib import Path

from drivetrain.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_MARK = "adapter_config.json"


class Shelf:
    """Which adapters clients can choose, and where they are.

    Clients name what is in the folder, and never a path.

    Args:
        folder: with adapters; empty: there are none.
        model: the model's own name, which no adapter can have.

    Raises:
        ConfigError: it is no folder, or an adapter has a name that cannot be served.
    """

    def __init__(self, folder: str, model: str) -> None:
        self._folder, self._model = Path(folder) if folder else None, model
        self.paths: dict[str, str] = {}
        if self._folder is None:
            return
        if not self._folder.is_dir():
            raise ConfigError(f"{folder} is no folder, so there are no adapters in it")
        for each in sorted(self._folder.iterdir()):
            if (each / _MARK).is_file():
                self.paths[each.name] = self.path(each.name)

    def path(self, name: str) -> str:
        """Where an adapter of that name would be.

        Raises:
            ConfigError: it cannot be there, or is not.
        """
        if self._folder is None:
            raise ConfigError("this server has no folder of adapters; start it with --adapters")
        if not _NAME.fullmatch(name) or name == self._model:
            raise ConfigError(
                f"{name[:200]!r} is no name of an adapter: letters, digits, '.', '_' and '-', and "
                "another one than that of the model"
            )
        if not (self._folder / name / _MARK).is_file():
            raise ConfigError(f"the folder of adapters has no {name!r} with {_MARK}")
        return str(self._folder / name)
