"""Hosts that are reached by a remote shell: ssh for each, or pdsh for all."""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drivetrain_launch.launchers.base import Launcher
from drivetrain_launch.variables import without_secrets
from drivetrain_launch.watch import Start
from drivetrain_launch.world import World

SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),  # asks for no password: nobody would see the question
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),  # so that a host that vanishes is missed after 15 seconds
    *("-o", "ServerAliveCountMax=3"),
)

_CANNOT_CONNECT = 255


def ssh_command(host: str, line: str, port: int | None, arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs a shell line on a host.

    Args:
        host: its name.
        line: for the user's shell there.
        port: of its ssh server; ``None`` for ssh's own choice.
        arguments: further ones of ssh.
    """
    where = ["-p", str(port)] if port is not None else []
    return ["ssh", *SSH_OPTIONS, *where, *arguments, host, line]


class Ssh(Launcher):
    """One connection to each host.

    The job's description goes through the connection, so no variable shows in a list of processes,
    and a host whose connection breaks ends its ranks.
    """

    name = "ssh"
    programs = ("ssh",)

    def starts(self, world: World) -> Sequence[Start]:
        lines = [
            self.shell_line(world, "--rank", str(rank), "-") for rank in range(len(world.hosts))
        ]
        return [
            Start(host.name, self._reach(host.name, line), first_line=world.text())
            for host, line in zip(world.hosts, lines, strict=True)
        ]

    def explain(self, who: str, code: int, tail: Sequence[str]) -> str:
        if code != _CANNOT_CONNECT:
            return super().explain(who, code, tail)
        said = f": {tail[-1]}" if tail else ""
        return (
            f"host {who} cannot be reached by ssh without a password, or its connection broke{said}"
        )

    def collect(self, world: World, logs: Path) -> str:
        for host in world.hosts:
            if not (logs / host.name).exists():  # no file system that hosts share
                self._fetch(host.name, logs)
        return str(logs)

    def _reach(self, host: str, line: str) -> list[str]:
        return ssh_command(host, line, self.settings.ssh_port, self.settings.arguments)

    def _fetch(self, host: str, logs: Path) -> None:
        command = self._reach(host, f"tar -C {shlex.quote(str(logs))} -cf - {shlex.quote(host)}")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode == 0 and done.stdout:
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                archive.extractall(logs, filter="data")


class Pdsh(Launcher):
    """One pdsh for all hosts, which connects by ssh."""

    name = "pdsh"
    programs = ("pdsh", "ssh")

    def starts(self, world: World) -> Sequence[Start]:
        # Its command line can be read by everybody, on this host and on the others.
        shown = replace(world, variables=without_secrets(world.variables, self.settings.named))
        # pdsh puts the host's place for %n, so a literal % is doubled.
        line = self.shell_line(shown, "--rank", "RANK", shown.text())
        line = line.replace("%", "%%").replace("--rank RANK", "--rank %n")
        hosts = ",".join(host.name for host in world.hosts)
        options = ["-S", "-R", "ssh", "-f", "1024", *self.settings.arguments]
        environment = {}
        if self.settings.ssh_port is not None:
            environment["PDSH_SSH_ARGS_APPEND"] = f"-p {self.settings.ssh_port}"
        return [Start("pdsh", ["pdsh", *options, "-w", hosts, line], environment=environment)]
