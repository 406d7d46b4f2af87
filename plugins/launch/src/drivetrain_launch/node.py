"""One host's part of a job; this is what launchers start on every host.

    python -m drivetrain_launch.node [--rank N] WORLD

``WORLD`` describes the job (:class:`~drivetrain_launch.world.World`), or is ``-``: then it is the
first line of the standard input. That stays open as long as the job is to go on; when it ends,
because the launching process or the connection is gone, this host's ranks are asked to end. Without
``--rank`` the host's place comes from the variables of whoever has started it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from drivetrain.errors import DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain_launch.devices import ACCELERATOR
from drivetrain_launch.discovery import discover
from drivetrain_launch.watch import FAILURE
from drivetrain_launch.world import World, compare_versions, own_versions

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Run this host's part; answers the exit status of ``drivetrain run``."""
    parser = ArgumentParser(prog="python -m drivetrain_launch.node")
    parser.add_argument("--rank", type=int)
    parser.add_argument("world")
    options = parser.parse_args()
    host = platform.node()
    try:
        line = sys.stdin.readline() if options.world == "-" else options.world
        world = World.of_text(line)
        rank = _own_rank(world) if options.rank is None else options.rank
        host = world.hosts[rank].name
        command, environment = _prepared(world, rank)
    except DrivetrainError as error:
        _tell(host, str(error))
        return 2
    return _run(command, environment, lifeline=options.world == "-")


def _own_rank(world: World) -> int:
    place = discover(os.environ)
    if place is None:
        raise DrivetrainError(
            f"{platform.node()}: nothing says which of the {len(world.hosts)} hosts this is"
        )
    if place.size != len(world.hosts):
        raise DrivetrainError(
            f"{place.source} has started {place.size} processes for {len(world.hosts)} hosts; "
            "one for each host is needed, and it starts the ranks"
        )
    return place.rank


def _prepared(world: World, rank: int) -> tuple[list[str], dict[str, str]]:
    """The command of a host and its environment.

    Raises:
        DrivetrainError: this host is not as the others need it.
    """
    host = world.hosts[rank]
    compare_versions(world.versions, own_versions(), host.name)
    try:
        os.chdir(world.folder)
    except OSError as error:
        raise DrivetrainError(
            f"host {host.name} has no folder {world.folder} ({error.strerror}): the script and its "
            "folder must be at the same place on every host"
        ) from error
    if not world.module and not Path(world.target).is_file():
        raise DrivetrainError(f"host {host.name} has no script {Path(world.target).absolute()}")
    environment = {**os.environ, **world.variables, "DRIVETRAIN_HOST": host.name}
    environment |= visible_devices(host.slots, environment, host.name)
    return [sys.executable, "-m", "drivetrain.cli", *world.run_command(rank)], environment


def visible_devices(
    slots: tuple[int, ...], environment: Mapping[str, str], host: str
) -> dict[str, str]:
    """Variables that show exactly the devices in ``slots`` to a process of this host.

    Args:
        slots: numbers of devices, among those that are visible already.
        environment: as it is.
        host: its name, for messages.

    Raises:
        DrivetrainError: there are fewer devices.
    """
    found = {}
    registry = Registry.installed()
    chosen = environment.get(ACCELERATOR)
    for name in registry.names("accelerators"):
        if chosen and name != chosen:  # a job on the CPU may have more ranks than there are GPUs
            continue
        accelerator = registry.load("accelerators", name)()
        variable = accelerator.visible_devices_variable
        if variable is None or accelerator.probe():  # what probe answers is why it cannot be used
            continue
        shown = [d for d in environment.get(variable, "").split(",") if d]
        shown = shown or [str(number) for number in range(accelerator.device_count())]
        if max(slots) >= len(shown):
            raise DrivetrainError(
                f"host {host} has {len(shown)} devices ({variable}), but slot {max(slots)} is to "
                "be used: correct its slots in the hostfile"
            )
        found[variable] = ",".join(shown[slot] for slot in slots)
    return found


def _run(command: list[str], environment: dict[str, str], *, lifeline: bool) -> int:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def end(number: int, _frame: object = None) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, end)
    if lifeline:

        def watch() -> None:
            while os.read(0, 4096):
                pass
            end(signal.SIGTERM)

        threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return process.wait()


def _tell(host: str, message: str) -> None:
    """Say why this host cannot take part, for the launching process to show."""
    failure = {"host": host, "time_ns": time.time_ns(), "follows": False, "text": message}
    sys.stderr.write(json.dumps({FAILURE: failure}) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
