"""What a scheduler is asked for, so that a job gets the devices that its accelerator needs."""

from __future__ import annotations

from collections.abc import Mapping

from drivetrain.plan.registry import Registry

ACCELERATOR = "DRIVETRAIN_ACCELERATOR"
"""Variable that tells ranks which accelerator to use."""

_HOST = "cpu"
"""The accelerator that core has itself, if no package offers another of that name."""


def needs_devices(variables: Mapping[str, str]) -> bool:
    """Whether a job runs on devices that a scheduler has to give, such as GPUs.

    True if nothing says which accelerator it uses: the host that asks often has no device itself.

    Args:
        variables: those that the job's ranks get.

    Raises:
        PluginError: the accelerator that is named is not installed.
    """
    name = variables.get(ACCELERATOR, "")
    registry = Registry.installed()
    if not name or (name == _HOST and name not in registry.names("accelerators")):
        return not name
    return registry.load("accelerators", name).visible_devices_variable is not None
