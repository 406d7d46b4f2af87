"""``engine.monitor``: numbers of a script's own in the monitors of its job."""

from __future__ import annotations

from collections.abc import Iterable

from drivetrain.engine.engine import Engine
from drivetrain.monitor import Monitor, write_events


class EngineMonitor:
    """What scripts call on ``engine.monitor``.

    Args:
        engine: whose monitors.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def enabled(self) -> bool:
        """Whether the config names a monitor."""
        return any(isinstance(p, Monitor) for p in self._engine.job.hub.plugins.values())

    def write_events(self, event_list: Iterable[tuple[str, float, int]]) -> None:
        """Show numbers; see :func:`drivetrain.monitor.write_events`.

        Args:
            event_list: name, value, and samples seen so far.
        """
        write_events(self._engine, event_list)
