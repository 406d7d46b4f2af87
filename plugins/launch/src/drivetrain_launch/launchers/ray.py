"""Ray: one task on each of its nodes, which runs that host's part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from drivetrain.errors import DrivetrainError
from drivetrain_launch.launchers.base import Launcher
from drivetrain_launch.variables import without_secrets
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World


class Ray(Launcher):
    """A driver process that asks a running Ray cluster (``RAY_ADDRESS``) for whole nodes."""

    name = "ray"
    equal_slots = True

    def check(self, world: World) -> None:
        super().check(world)
        if find_spec("ray") is None:
            raise DrivetrainError(
                "--launcher ray needs Ray: pip install 'drivetrain-launch[ray]' on every host"
            )

    def starts(self, world: World) -> Sequence[Start]:
        shown = replace(world, variables=without_secrets(world.variables, self.settings.named))
        command = [self.settings.python, "-m", "drivetrain_launch.ray_driver", "-"]
        return [Start(self.name, command, first_line=shown.text())]
