"""What core's defaults have in common."""

from __future__ import annotations

from drivetrain.plugin import Plugin


class Builtin(Plugin):
    """A default of core: part of every plan, whatever its sections say."""

    def enabled(self) -> bool:
        return True
