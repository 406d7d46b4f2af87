"""MPI's launchers: one process on each host, which starts the ranks of that host."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from drivetrain_launch.launchers.base import Launcher
from drivetrain_launch.variables import without_secrets
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World


class Mpi(Launcher):
    """What those launchers share: variables are named, and their values taken from ours."""

    def starts(self, world: World) -> Sequence[Start]:
        command = [*self.head(world), *self.settings.arguments, *self.node(_bare(world).text())]
        return [Start(self.name, command, environment=world.variables)]

    @abstractmethod
    def head(self, world: World) -> list[str]:
        """The program, and how many processes it starts on which hosts."""


class OpenMpi(Mpi):
    """OpenMPI's ``mpirun``."""

    name = "openmpi"
    programs = ("mpirun",)

    def head(self, world: World) -> list[str]:
        hosts = ",".join(f"{host.name}:1" for host in world.hosts)
        variables = [part for name in sorted(world.variables) for part in ("-x", name)]
        count = str(len(world.hosts))
        # ranks are bound by whoever starts them, and this process is their parent
        return ["mpirun", "-n", count, "--host", hosts, "--bind-to", "none", *variables]


class Mpich(Mpi):
    """MPICH's ``mpiexec``."""

    name = "mpich"
    programs = ("mpiexec",)

    def head(self, world: World) -> list[str]:
        hosts = ",".join(host.name for host in world.hosts)
        names = ",".join(sorted(world.variables))
        count = str(len(world.hosts))
        return ["mpiexec", "-n", count, "-ppn", "1", "-hosts", hosts, "-genvlist", names]


class IntelMpi(Mpi):
    """Intel MPI's ``mpirun``."""

    name = "impi"
    programs = ("mpirun",)

    def head(self, world: World) -> list[str]:
        hosts = ",".join(host.name for host in world.hosts)
        names = ",".join(sorted(world.variables))
        pins = ["-genv", "I_MPI_PIN", "0"]  # ranks are bound by whoever starts them
        count = str(len(world.hosts))
        return ["mpirun", "-n", count, "-ppn", "1", "-hosts", hosts, *pins, "-genvlist", names]


class Mvapich(Launcher):
    """MVAPICH's ``mpirun_rsh``, which takes variables with their values."""

    name = "mvapich"
    programs = ("mpirun_rsh",)

    def starts(self, world: World) -> Sequence[Start]:
        hostfile = Path(world.logs) / "mvapich.hosts"
        hostfile.write_text("".join(f"{host.name}\n" for host in world.hosts), "utf-8")
        variables = without_secrets(world.variables, self.settings.named)
        pairs = [f"{name}={value}" for name, value in sorted(variables.items())]
        head = ["mpirun_rsh", "-np", str(len(world.hosts)), "-hostfile", str(hostfile)]
        own = [*pairs, "MV2_ENABLE_AFFINITY=0"]
        command = [*head, *self.settings.arguments, *own, *self.node(_bare(world).text())]
        return [Start(self.name, command)]


def _bare(world: World) -> World:
    """The description without variables, since the launcher carries them."""
    return World(**{**vars(world), "variables": {}})
