"""Which hosts take part in a job, and which devices of them.

A hostfile has a line ``NAME slots=N`` for each host. ``--include`` and ``--exclude`` take
``NAME[:SLOT,SLOT...]``, several of them joined by ``@``: the notation of DeepSpeed's launcher. A
host that is named more than once is meant with all the slots that are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drivetrain.errors import DrivetrainError
from drivetrain.wording import did_you_mean

_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)\s*(#.*)?")


@dataclass(frozen=True)
class Host:
    """One host of a job.

    Args:
        name: how it is reached.
        slots: its devices that take part, as numbers from 0; one rank runs on each.
    """

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile, in its order.

    Raises:
        DrivetrainError: it cannot be read, or lines are wrong; all of them are named.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DrivetrainError(f"hostfile {path} cannot be read: {reason}") from error
    return parse_hostfile(lines, str(path))


def parse_hostfile(lines: Iterable[str], source: str) -> list[Host]:
    """The hosts that the lines of a hostfile name, in their order.

    Args:
        lines: without their ends.
        source: how messages call the file.

    Raises:
        DrivetrainError: lines are wrong; all of them are named.
    """
    hosts: dict[str, Host] = {}
    first_line: dict[str, int] = {}
    problems = []
    for number, text in enumerate(lines, 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            problems.append(f"{source}:{number}: {line!r} is not of the form 'NAME slots=NUMBER'")
        elif int(found["slots"]) == 0:
            problems.append(f"{source}:{number}: host {found['name']!r} has no slots; leave it out")
        elif found["name"] in hosts:
            first = first_line[found["name"]]
            problems.append(f"{source}:{number}: host {found['name']!r} is in line {first} already")
        else:
            hosts[found["name"]] = Host(found["name"], tuple(range(int(found["slots"]))))
            first_line[found["name"]] = number
    if not hosts and not problems:
        problems.append(f"{source}: names no host; it needs lines like 'worker-1 slots=8'")
    if problems:
        raise DrivetrainError("\n".join(problems))
    return list(hosts.values())


def choose(
    hosts: Sequence[Host],
    *,
    include: str = "",
    exclude: str = "",
    nodes: int | None = None,
    per_node: int | None = None,
) -> list[Host]:
    """Those of ``hosts`` that take part, in their order.

    Args:
        hosts: all there are.
        include: hosts and slots to take; all if empty.
        exclude: hosts and slots to leave out.
        nodes: take the first so many hosts.
        per_node: take the first so many slots of each.

    Raises:
        DrivetrainError: a host or slot does not exist, options contradict each other, or nothing
            is left.
    """
    if (include or exclude) and (nodes is not None or per_node is not None):
        raise DrivetrainError(
            "--num-nodes and --num-gpus count from the first host and slot; they cannot be used "
            "together with --include or --exclude, which name them"
        )
    chosen = filtered(hosts, include=include, exclude=exclude)
    if not chosen:
        raise DrivetrainError("--exclude leaves no host")
    return _first(chosen, nodes, per_node)


def filtered(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """What filters leave of ``hosts``, which may be nothing; see :func:`choose`.

    Raises:
        DrivetrainError: a host or slot does not exist, or both filters are given.
    """
    if include and exclude:
        raise DrivetrainError("--include and --exclude cannot be used together; give one of them")
    if include:
        wanted = _named(include, hosts, "--include")
        return [replace(h, slots=wanted[h.name]) for h in hosts if h.name in wanted]
    if not exclude:
        return list(hosts)
    without = _named(exclude, hosts, "--exclude")
    kept = [
        replace(h, slots=tuple(s for s in h.slots if s not in without.get(h.name, ())))
        for h in hosts
    ]
    return [host for host in kept if host.slots]


def _first(hosts: list[Host], nodes: int | None, per_node: int | None) -> list[Host]:
    if nodes is not None and not 1 <= nodes <= len(hosts):
        raise DrivetrainError(f"--num-nodes {nodes}: there are {len(hosts)} hosts")
    hosts = hosts[:nodes]
    if per_node is None:
        return hosts
    short = [f"{h.name} has {len(h.slots)}" for h in hosts if len(h.slots) < per_node]
    if per_node < 1 or short:
        reason = "it must be positive" if per_node < 1 else ", ".join(short)
        raise DrivetrainError(f"--num-gpus {per_node}: {reason}")
    return [replace(host, slots=host.slots[:per_node]) for host in hosts]


def _named(text: str, hosts: Sequence[Host], option: str) -> dict[str, tuple[int, ...]]:
    """Host -> slots that ``text`` names."""
    known = {host.name: host.slots for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in known:
            raise DrivetrainError(
                f"{option}: no host is named {name!r}{did_you_mean(name, list(known))}"
            )
        slots = _slots(numbers, known[name], f"{option} {name}") if colon else known[name]
        named[name] = tuple(sorted({*named.get(name, ()), *slots}))
    return named


def _slots(text: str, known: tuple[int, ...], where: str) -> tuple[int, ...]:
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise DrivetrainError(f"{where}: slots are numbers with commas between, got {text!r}")
    wrong = [number for number in numbers if int(number) not in known]
    if wrong:
        raise DrivetrainError(f"{where}: no slot {', '.join(wrong)}; it has {_listed(known)}")
    return tuple(sorted({int(number) for number in numbers}))


def _listed(slots: tuple[int, ...]) -> str:
    whole = slots == tuple(range(len(slots)))
    return f"0 to {len(slots) - 1}" if whole and len(slots) > 1 else ", ".join(map(str, slots))
