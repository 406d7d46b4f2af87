"""Numbers of a script's own in monitors: those of an engine, or some that a script names itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deepspeed._config.sections import SectionView
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.monitor import Event, Monitor, Writer, write_events
from drivetrain.plan.plan import Plan

if TYPE_CHECKING:
    from drivetrain.contracts import Plugin

logger = logging.getLogger("deepspeed")


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


class _Tensorboard(SectionView):
    path = "tensorboard"


class _Wandb(SectionView):
    path = "wandb"


class _Csv(SectionView):
    path = "csv_monitor"


class _Comet(SectionView):
    path = "comet"


class DeepSpeedMonitorConfig:
    """The sections of monitors in a config, each as an object.

    Args:
        sections: name -> keys; those of ``NAMES``, or of another monitor that is installed.

    Raises:
        ConfigError: a key is unknown, or a value is not one that it may have.
    """

    NAMES: ClassVar[Mapping[str, type[SectionView]]] = {
        kind.path: kind for kind in (_Tensorboard, _Wandb, _Csv, _Comet)
    }

    def __init__(self, **sections: Mapping[str, Any]) -> None:
        self.sections = {name: dict(keys) for name, keys in sections.items()}

    def __getattr__(self, name: str) -> SectionView:
        if name not in self.NAMES:
            raise AttributeError(f"the config has no monitor {name!r}")
        return self.NAMES[name](**self.sections.get(name, {}))

    @property
    def enabled(self) -> bool:
        """Whether a monitor is switched on."""
        return any(keys.get("enabled", False) for keys in self.sections.values())


def get_monitor_config(param_dict: Mapping[str, Any]) -> DeepSpeedMonitorConfig:
    """The sections of monitors in a whole config."""
    named = {n: param_dict[n] for n in DeepSpeedMonitorConfig.NAMES if n in param_dict}
    return DeepSpeedMonitorConfig(**named)


class SingleMonitor:
    """One monitor without an engine, opened by the first rank if its section switches it on.

    The section's keys are attributes.

    Args:
        config: the section, such as ``DeepSpeedConfig(...).monitor_config.tensorboard``.

    Raises:
        PluginError: the monitor is switched on and not installed.
    """

    def __init__(self, config: SectionView) -> None:
        self._config = config
        keys = {name: getattr(config, name) for name in config.given}
        self._master = MonitorMaster(DeepSpeedMonitorConfig(**{config.path: keys}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._config, name)

    def write_events(
        self, event_list: Iterable[tuple[str, float, int]], flush: bool = True
    ) -> None:
        """Show numbers; see :meth:`MonitorMaster.write_events`.

        Args:
            event_list: name, value, and its place on the x axis.
            flush: accepted; numbers are shown at once.
        """
        self._master.write_events(event_list)

    def close(self) -> None:
        """Release files and connections."""
        self._master.close()


class MonitorMaster:
    """Monitors without an engine: the first rank writes what a script gives it.

    Args:
        monitor_config: of :func:`get_monitor_config`, or ``DeepSpeedConfig(...).monitor_config``.

    Raises:
        ConfigError: a section is wrong.
        PluginError: a monitor that is switched on is not installed.
    """

    def __init__(self, monitor_config: DeepSpeedMonitorConfig) -> None:
        self.enabled = monitor_config.enabled
        used = {n: keys for n, keys in monitor_config.sections.items() if keys.get("enabled")}
        ranks = Ranks.current()
        self._writers: dict[str, Writer] = {}
        if not used or ranks.rank != 0:
            return
        plan = Plan.build({"train_micro_batch_size_per_gpu": 1, **used})
        # All that a writer asks of an engine is of which job it is.
        job = SimpleNamespace(plan=plan, rank=ranks.rank, ranks=ranks)
        for plugin in cast("list[Plugin]", [member.plugin for member in plan.members]):
            if isinstance(plugin, Monitor) and plugin.name in used:
                engine = cast("Engine", SimpleNamespace(job=job))
                self._writers[plugin.name] = plugin.open_writer(engine, 0)

    def write_events(self, event_list: Iterable[tuple[str, float, int]]) -> None:
        """Show numbers at once; a monitor that fails is left out from then on, with a warning.

        Args:
            event_list: name, value, and its place on the x axis.
        """
        events = [Event(*event) for event in event_list]
        for name, writer in list(self._writers.items()):
            try:
                writer.write(events)
            except Exception as error:  # noqa: BLE001 - whatever a monitor's library may raise
                logger.warning("%s shows nothing more: %s: %s", name, type(error).__name__, error)
                del self._writers[name]

    def close(self) -> None:
        """Release files and connections."""
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.close()
