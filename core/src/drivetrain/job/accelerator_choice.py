"""Which accelerator this process uses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from drivetrain import system
from drivetrain.contracts.world.accelerator import Accelerator
from drivetrain.errors import ConfigError, PluginError
from drivetrain.plan.registry import Registry

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan

logger = logging.getLogger("drivetrain.accelerator")

VARIABLE = "DRIVETRAIN_ACCELERATOR"

_in_use: list[Accelerator] = []
"""Those of the open jobs of this process, in the order in which they were opened."""


class HostAccelerator(Accelerator):
    """The host's CPU with what torch alone offers; drivetrain-cpu takes its place if installed.

    Memory counts the whole process, since torch does not count tensors in host memory.
    """

    name = "cpu"
    device_type = "cpu"

    def probe(self) -> str | None:
        return None

    def communication_backend(self) -> str:
        return "gloo"

    def memory_allocated(self) -> int:
        return self.max_memory_allocated()

    def max_memory_allocated(self) -> int:
        return system.peak_memory()

    def reset_peak_memory(self) -> None:
        pass  # the system's peak is that of the process's whole life

    def total_memory(self) -> int:
        return system.total_memory()


def active_accelerator() -> str | None:
    """Name of the accelerator of the job that was opened last of those that are open, if any is.

    Kernels that belong to one accelerator are used while it is active.
    """
    return _in_use[-1].name if _in_use else None


@contextmanager
def active(accelerator: Accelerator) -> Iterator[None]:
    """Context in which an accelerator is the active one; a job is in it until it closes."""
    _in_use.append(accelerator)
    try:
        yield
    finally:
        _in_use.remove(accelerator)  # jobs close in any order


def choose_accelerator(plan: Plan | None = None) -> Accelerator:
    """The accelerator that the config or ``DRIVETRAIN_ACCELERATOR`` names, else the one present.

    With ``auto`` every installed accelerator is probed, and why one is not used is logged. One
    that is no CPU goes before the CPU; two of them leave the choice to the user. Of several that
    run on the CPU the one named ``cpu`` is taken.

    Args:
        plan: its config, plugins and hooks; without it, the environment and what is installed.

    Raises:
        ConfigError: the accelerator asked for does not work here, or several could be meant.
        PluginError: the accelerator asked for is not installed or does not load.
    """
    registry = plan.registry if plan is not None else Registry.installed()
    requested, source = _requested(plan)
    candidates: dict[str, Accelerator] = {}
    for name in [requested] if requested else sorted({*registry.names("accelerators"), "cpu"}):
        try:
            accelerator = _load(registry, name)
        except PluginError as error:
            if requested:
                raise
            logger.info("accelerator %s is not used: %s", name, error)
            continue
        reason = accelerator.probe()
        if reason is None:
            candidates[name] = accelerator
        elif requested:
            raise ConfigError(f"{source} asks for {name!r}, which cannot be used here: {reason}")
        else:
            logger.info("accelerator %s is not used: %s", name, reason)
    chosen = plan.hub.select_accelerator(candidates, requested) if plan is not None else None
    if chosen is not None and chosen not in candidates.values():
        names = ", ".join(candidates) or "there is none"
        raise PluginError(
            f"the hook select_accelerator chose {chosen!r}, which is no candidate ({names}): it "
            "has to return one of the accelerators that it gets"
        )
    chosen = chosen or _only(candidates)
    if plan is not None:
        chosen.configure(plan)
    return chosen


def _requested(plan: Plan | None) -> tuple[str | None, str]:
    """The accelerator asked for, and who asks; the config goes before the environment."""
    from drivetrain.sections.mesh import AcceleratorName

    wishes = {
        "the config key 'accelerator'": plan.section(AcceleratorName).root if plan else "auto",
        f"the environment variable {VARIABLE}": os.environ.get(VARIABLE, "auto"),
    }
    named = [(name, source) for source, name in wishes.items() if name != "auto"]
    return named[0] if named else (None, "")


def _load(registry: Registry, name: str) -> Accelerator:
    if name == "cpu" and registry.find("accelerators", name) is None:
        return HostAccelerator()
    accelerator: Accelerator = registry.load("accelerators", name)()
    return accelerator


def _only(candidates: dict[str, Accelerator]) -> Accelerator:
    devices = {name: a for name, a in candidates.items() if a.device_type != "cpu"}
    if len(devices) > 1:
        raise ConfigError(
            f"accelerators {', '.join(devices)} all claim this process: choose one with the config "
            f"key 'accelerator' or the environment variable {VARIABLE}"
        )
    if not candidates:
        raise ConfigError(
            "no accelerator can be used here; the log of drivetrain.accelerator says why, and "
            "DRIVETRAIN_DISABLE_PLUGINS=<distribution> switches one off that does not load"
        )
    usual = {} if devices or "cpu" not in candidates else {"cpu": candidates["cpu"]}
    return next(iter((devices or usual or candidates).values()))
