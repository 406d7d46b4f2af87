"""What a launcher is."""

from __future__ import annotations

import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from drivetrain.errors import DrivetrainError
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World


@dataclass(frozen=True)
class Settings:
    """How a launcher works.

    Args:
        arguments: further arguments of its program.
        ssh_port: port of the hosts' ssh servers; ``None`` for ssh's own choice.
        python: the interpreter on every host.
        setup: shell command that comes first on every host, such as ``source venv/bin/activate``;
            empty for none.
        named: variables that the user has asked for one by one.
        image: container image, where hosts are pods.
    """

    arguments: tuple[str, ...] = ()
    ssh_port: int | None = None
    python: str = sys.executable
    setup: str = ""
    named: tuple[str, ...] = ()
    image: str = ""


class Launcher(ABC):
    """Starts ``python -m drivetrain_launch.node`` once on every host.

    Third parties register their own by an entry point of the group ``drivetrain.launchers``.

    Attributes:
        name: as ``--launcher`` takes it.
        programs: what must be there on the launching host.
        equal_slots: whether all hosts must have equally many slots.
    """

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    equal_slots: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, world: World) -> None:
        """Refuse what this launcher cannot do, before anything is started.

        Raises:
            DrivetrainError: a program is missing, or the hosts do not fit.
        """
        missing = [program for program in self.programs if shutil.which(program) is None]
        if missing:
            raise DrivetrainError(
                f"--launcher {self.name} needs the program {', '.join(missing)}, which is not "
                "there: install it, or choose another launcher"
            )
        counts = {len(host.slots) for host in world.hosts}
        if self.equal_slots and len(counts) > 1:
            found = ", ".join(f"{host.name}: {len(host.slots)}" for host in world.hosts)
            raise DrivetrainError(
                f"--launcher {self.name} needs equally many slots on every host, got {found}"
            )

    @abstractmethod
    def starts(self, world: World) -> Sequence[Start]:
        """The commands that start all hosts."""

    def explain(self, who: str, code: int, tail: Sequence[str]) -> str:
        """What it means that a command has failed without a word of ours.

        Args:
            who: of the command.
            code: its exit status; negative after a signal.
            tail: the last lines that it wrote to its standard error.
        """
        return f"{who} exited with code {code}" + "".join(f"\n  | {line}" for line in tail)

    def collect(self, world: World, logs: Path) -> str:
        """Bring the hosts' logs here, if that can be done; answers where they are."""
        return f"{logs}, on each host in the folder of its name"

    def node(self, *arguments: str) -> list[str]:
        """The command that runs a host's part, without a shell."""
        return [self.settings.python, "-m", "drivetrain_launch.node", *arguments]

    def shell_line(self, world: World, *arguments: str) -> str:
        """The same as one line for a shell on the host."""
        parts = [self.settings.setup] if self.settings.setup else []
        parts.append(f"cd {shlex.quote(world.folder)}")
        return " && ".join([*parts, f"exec {shlex.join(self.node(*arguments))}"])
