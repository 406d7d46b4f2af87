"""The adapters of one engine, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_inference.adapters.adapter import Adapter
from drivetrain_inference.adapters.loading import load_adapter


class Adapters:
    """Loads and forgets adapters while requests run.

    A sequence keeps the adapter that it has begun with, so one that is loaded again under its name,
    or forgotten, changes nothing for those that run. The cache tells the keys and values of each
    from those of all others.

    Args:
        module: what adapters change.
        check: raises if an adapter cannot be computed with.
    """

    def __init__(self, module: nn.Module, check: Callable[[Adapter], None]) -> None:
        self._module, self._check = module, check
        self._known: dict[str, Adapter] = {}

    @property
    def names(self) -> list[str]:
        """Those that requests can choose."""
        return sorted(self._known)

    @torch.no_grad()
    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load an adapter that PEFT has written, or load it again.

        Args:
            name: how requests choose it.
            path: the folder.

        Raises:
            ConfigError: it cannot be served; nothing has changed.
        """
        if not name:
            raise ConfigError("an adapter needs a name")
        adapter = load_adapter(name, Path(path), self._module)
        self._check(adapter)
        self._known[name] = adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run with it go on.

        Raises:
            ConfigError: there is none of that name.
        """
        if self.find(name) is not None:
            del self._known[name]

    def find(self, name: str) -> Adapter | None:
        """The adapter of a name; ``None`` for the empty one, which is the model as it is.

        Raises:
            ConfigError: there is none of that name.
        """
        if not name:
            return None
        if name not in self._known:
            known = ", ".join(self.names) or "none"
            raise ConfigError(f"there is no adapter {name!r}; there is {known}")
        return self._known[name]
