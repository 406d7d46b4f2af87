"""What every host of a job is told: who takes part, where they meet, and what runs."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

from drivetrain.errors import DrivetrainError
from drivetrain_launch.hosts import Host

_COMPARED = ("drivetrain", "drivetrain-launch", "torch")


@dataclass(frozen=True)
class World:
    """A job on several hosts.

    Args:
        hosts: those that take part, in the order of their ranks.
        master_addr: address of the first host, as the others reach it.
        master_port: port there.
        folder: working directory on every host.
        logs: absolute path of the run folder; each host writes into a folder of its name.
        options: further options of ``drivetrain run``.
        target: the script, or the module's name.
        arguments: of the script.
        module: whether ``target`` is a module.
        variables: environment variables to set.
        nodes: ``MIN:MAX`` hosts of an elastic job, which meet in any order; empty for all of them.
        versions: what the launching host has installed.
    """

    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    folder: str
    logs: str
    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    nodes: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(len(host.slots) for host in self.hosts)

    def text(self) -> str:
        """As one line without blanks and quotes, for command lines."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def of_text(cls, text: str) -> World:
        """What :meth:`text` has made a line of.

        Raises:
            DrivetrainError: it is none.
        """
        try:
            content = json.loads(base64.urlsafe_b64decode(text.strip()))
            content["hosts"] = tuple(
                Host(host["name"], tuple(host["slots"])) for host in content["hosts"]
            )
            for name in ("arguments", "options"):
                content[name] = tuple(content[name])
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise DrivetrainError(f"the description of the job is damaged: {error}") from error

    def run_command(self, rank: int) -> list[str]:
        """Arguments of ``drivetrain`` that run one host's part.

        Args:
            rank: the host's place among the hosts.
        """
        host = self.hosts[rank]
        meeting: list[str] = []
        if self.nodes:
            meeting = ["--nnodes", self.nodes]
            meeting += ["--rdzv-endpoint", f"{self.master_addr}:{self.master_port}"]
        elif len(self.hosts) > 1:
            meeting = ["--nnodes", str(len(self.hosts)), "--node-rank", str(rank)]
            meeting += ["--master-addr", self.master_addr, "--master-port", str(self.master_port)]
        return [
            *("run", "--nproc", str(len(host.slots)), *meeting),
            *("--log-dir", f"{self.logs}/{host.name}", "--failure-format", "json"),
            *(*self.options, *(["--module"] if self.module else []), self.target),
            *self.arguments,
        ]


def own_versions() -> dict[str, str]:
    """What must be the same on all hosts of a job."""
    found = {"python": platform.python_version().rpartition(".")[0]}
    for name in _COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def compare_versions(wanted: Mapping[str, str], own: Mapping[str, str], host: str) -> None:
    """Refuse a host whose packages are not those of the launching one.

    Raises:
        DrivetrainError: they differ.
    """
    other = [
        f"{name} {own[name]} where the launching host has {wanted[name]}"
        for name in wanted
        if name in own and own[name] != wanted[name]
    ]
    if other:
        raise DrivetrainError(
            f"host {host} has {'; '.join(other)}: install the same versions on every host"
        )
