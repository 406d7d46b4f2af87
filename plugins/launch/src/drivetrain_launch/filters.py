"""Hosts and slots in the notation of DeepSpeed's launcher, for scripts that read it themselves."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from drivetrain_launch import hosts
from drivetrain_launch.hosts import Host, filtered, read_hostfile

Slots = Mapping[str, Sequence[int]]


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """The number of slots of every host in a hostfile, in its order; ``None`` without a file.

    Raises:
        DrivetrainError: lines are wrong; all of them are named.
    """
    path = Path(hostfile_path)
    if not path.is_file():
        return None
    return {host.name: len(host.slots) for host in read_hostfile(path)}


def parse_hostfile(hostfile_lines: Iterable[str]) -> dict[str, int]:
    """The number of slots of every host that the lines of a hostfile name, in their order.

    Raises:
        DrivetrainError: lines are wrong; all of them are named.
    """
    found = hosts.parse_hostfile(hostfile_lines, "hostfile")
    return {host.name: len(host.slots) for host in found}


def parse_resource_filter(
    host_info: Slots, include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """The hosts that take part, and their slots; none if all are left out.

    Args:
        host_info: all hosts and their slots.
        include_str: hosts and slots to take, ``NAME[:SLOT,SLOT...]`` joined by ``@``; all if empty.
        exclude_str: hosts and slots to leave out.

    Raises:
        DrivetrainError: a host or slot does not exist, or both filters are given.
    """
    every = [Host(name, tuple(slots)) for name, slots in host_info.items()]
    chosen = filtered(every, include=include_str, exclude=exclude_str)
    return {host.name: list(host.slots) for host in chosen}


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> dict[str, list[int]]:
    """:func:`parse_resource_filter` for hosts of which only the numbers of slots are known."""
    every = {name: list(range(slots)) for name, slots in resource_pool.items()}
    return parse_resource_filter(every, inclusion, exclusion)


def encode_world_info(world_info: Slots) -> str:
    """Hosts and slots as one word for a command line: base64-url of their JSON."""
    text = json.dumps({name: list(slots) for name, slots in world_info.items()})
    return base64.urlsafe_b64encode(text.encode()).decode()
