"""Which cores each rank of a machine runs on, so that ranks do not take each other's caches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from drivetrain.errors import DrivetrainError

VARIABLE = "DRIVETRAIN_CORES"
"""Cores of every local rank, as ``0-3:4-7``; each rank binds itself before anything is imported."""

_SYSTEM = Path("/sys/devices/system")


def core_variables(ranks: int, text: str) -> dict[str, str]:
    """Environment variables that bind the ranks of this machine.

    Args:
        ranks: how many there are.
        text: cores to share out, such as ``0-15,32-47``; empty for all that this process may use.

    Raises:
        DrivetrainError: cores cannot be bound here, do not exist, or are too few.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise DrivetrainError("--bind-cores: this system cannot bind processes to cores")
    own = os.sched_getaffinity(0)
    cores = parse_cores(text) if text else sorted(own)
    if missing := [core for core in cores if core not in own]:
        raise DrivetrainError(
            f"--core-list: this process may not use cores {format_cores(missing)}"
        )
    shares = share_out(physical_first(cores, _siblings(cores)), _nodes(cores), ranks)
    text = ":".join(format_cores(sorted(share)) for share in shares)
    return {VARIABLE: text, "OMP_NUM_THREADS": str(min(len(share) for share in shares))}


def share_out(cores: Sequence[int], nodes: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """Equally many cores for each rank, of one NUMA node wherever that is possible.

    Args:
        cores: one hardware thread of each physical core.
        nodes: the cores of each NUMA node.
        ranks: how many shares to make.

    Raises:
        DrivetrainError: there are fewer cores than ranks.
    """
    if len(cores) < ranks:
        raise DrivetrainError(
            f"--bind-cores: {ranks} ranks need a core each, and there are {len(cores)}"
        )
    usable = set(cores)
    by_node = [[core for core in node if core in usable] for node in nodes]
    by_node = [node for node in by_node if node] or [list(cores)]
    # Ranks are dealt to nodes like devices are: the first ones to the first node.
    per_node, more = divmod(ranks, len(by_node))
    dealt = [per_node + (n < more) for n in range(len(by_node))]
    if all(count <= len(node) for count, node in zip(dealt, by_node, strict=True)):
        sizes = [len(n) // c for n, c in zip(by_node, dealt, strict=True) if c]
        return [
            node[k * min(sizes) : (k + 1) * min(sizes)]
            for node, count in zip(by_node, dealt, strict=True)
            for k in range(count)
        ]
    size = len(cores) // ranks
    return [list(cores[k * size : (k + 1) * size]) for k in range(ranks)]


def physical_first(cores: Sequence[int], siblings: Sequence[Sequence[int]]) -> list[int]:
    """One hardware thread of each physical core, in order.

    Args:
        cores: hardware threads.
        siblings: for each of them, all threads of its core.
    """
    seen: set[int] = set()
    kept = []
    for core, group in zip(cores, siblings, strict=True):
        if core not in seen:
            kept.append(core)
            seen.update(group)
    return kept


def parse_cores(text: str) -> list[int]:
    """Cores of a list as Linux writes it, e.g. ``0-3,8``: in order, each once.

    Raises:
        DrivetrainError: it is no such list, or a core is in it twice or out of order.
    """
    cores: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        wrong = not first.isdecimal() or (dash and not last.isdecimal())
        if wrong or (dash and int(last) < int(first)):
            raise DrivetrainError(
                f"--core-list takes numbers and ranges such as 0-3,8, got {text!r}"
            )
        cores += range(int(first), int(last if dash else first) + 1)
    for before, core in pairwise(cores):
        if core <= before:
            problem = "twice" if core in cores[: cores.index(before) + 1] else "out of order"
            raise DrivetrainError(f"--core-list {text!r} names core {core} {problem}")
    return cores


def format_cores(cores: Sequence[int]) -> str:
    """The opposite of :func:`parse_cores`; ``cores`` ascend."""
    parts: list[str] = []
    for index, core in enumerate(cores):
        if index and cores[index - 1] == core - 1:
            first = parts.pop().partition("-")[0]
            parts.append(f"{first}-{core}")
        else:
            parts.append(str(core))
    return ",".join(parts)


def bind(text: str, local_rank: int) -> None:
    """Bind this process to the share of one rank.

    Args:
        text: what :data:`VARIABLE` holds.
        local_rank: of the ranks on this machine.
    """
    shares = text.split(":")
    if local_rank < len(shares):
        os.sched_setaffinity(0, parse_cores(shares[local_rank]))


def _siblings(cores: Sequence[int]) -> list[list[int]]:
    """Hardware threads of the physical core of each."""
    return [
        _listed(_SYSTEM / f"cpu/cpu{core}/topology/thread_siblings_list", [core]) for core in cores
    ]


def _nodes(cores: Sequence[int]) -> list[list[int]]:
    """Cores of each NUMA node."""
    folders = sorted(_SYSTEM.glob("node/node[0-9]*"), key=lambda path: int(path.name[4:]))
    return [_listed(folder / "cpulist", []) for folder in folders] or [list(cores)]


def _listed(path: Path, otherwise: list[int]) -> list[int]:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return otherwise
    return parse_cores(text) if text else otherwise
