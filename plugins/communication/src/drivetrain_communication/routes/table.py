"""Measured tables: which route is the fastest for each collective, size and shape of axis here."""

from __future__ import annotations

import json
import platform
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from drivetrain.contracts import Kind
from drivetrain.errors import ConfigError
from drivetrain_communication.routes.section import PATH, RouteName
from drivetrain_communication.routes.texts import text_of_first, texts_of_ranks

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator
    from drivetrain.job.job import Job

_FORMAT = "drivetrain-routes-1"

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Shape:
    """What makes two axes alike for a table.

    Args:
        ranks: along the axis.
        hosts: that they are on.
    """

    ranks: int
    hosts: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks on {self.hosts} hosts"


@dataclass
class Table:
    """The fastest route by collective, shape of the axis, and size.

    Args:
        cluster: where it was measured, see :func:`cluster_of`.
        best: (collective, shape) -> sizes in bytes, ascending, each with its route. A tensor goes
            by the largest of them that it reaches; a smaller one by the first.
        measured: rows of every measurement, for people.
    """

    cluster: Mapping[str, Any]
    best: dict[tuple[str, Shape], list[tuple[int, str]]] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)

    def route(self, kind: Kind, shape: Shape, nbytes: int) -> str | None:
        """The route for one collective; ``None`` if nothing like it was measured."""
        rows = self.best.get((str(kind), shape))
        if not rows:
            return None
        return rows[max(0, bisect_right(rows, nbytes, key=lambda row: row[0]) - 1)][1]

    def routes(self) -> list[str]:
        """Names of all routes that it chooses."""
        return sorted({route for rows in self.best.values() for _, route in rows})

    def dumps(self) -> str:
        """As text of a file."""
        best = [
            {"collective": kind, "ranks": shape.ranks, "hosts": shape.hosts, "by_size": rows}
            for (kind, shape), rows in self.best.items()
        ]
        whole = {
            "format": _FORMAT,
            "cluster": self.cluster,
            "best": best,
            "measured": self.measured,
        }
        return json.dumps(whole, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> Table:
        """From the text of a file.

        Raises:
            ValueError: it is none of these files.
        """
        try:
            found = json.loads(text)
            if found["format"] != _FORMAT:
                raise ValueError(f"its format is {found['format']!r}, expected {_FORMAT!r}")
            best = {
                (str(row["collective"]), Shape(int(row["ranks"]), int(row["hosts"]))): sorted(
                    (int(size), str(route)) for size, route in row["by_size"]
                )
                for row in found["best"]
            }
            table = cls(dict(found["cluster"]), best, list(found["measured"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"it is no table of `drivetrain comm tune` ({type(error).__name__}: {error})"
            ) from None
        if unknown := set(table.routes()) - set(get_args(RouteName)):
            raise ValueError(f"it names a route that does not exist: {', '.join(sorted(unknown))}")
        return table


def cluster_of(job: Job, inner: Communicator, hosts: Sequence[int]) -> dict[str, Any]:
    """What a table's measurements hold for: ranks by host, processors, devices. Collective.

    Args:
        job: whose ranks they are.
        inner: carries what they tell each other.
        hosts: the host of each rank.
    """
    texts = texts_of_ranks(job, inner, f"{_processor()}; {_device(job)}")
    members: dict[int, int] = {}
    for host in hosts:
        members[host] = members.get(host, 0) + 1
    return {"ranks_of_hosts": list(members.values()), "machines": sorted(set(texts))}


def _processor() -> str:
    name = platform.processor() or platform.machine()
    if _CPU_INFO.is_file():
        lines = _CPU_INFO.read_text("utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{len(names)} x {names[0]}"
    return name


def _device(job: Job) -> str:
    if job.device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(job.device.type)
    name = getattr(module, "get_device_name", lambda _index: job.device.type)
    return str(name(job.device))


def read_table(job: Job, path: str, inner: Communicator, hosts: Sequence[int]) -> Table:
    """The table in ``path``, which rank 0 reads and hands to all. Collective.

    Raises:
        ConfigError: (on every rank) it cannot be read, is no table, or is one of another cluster.
    """
    text, flaw = "", ""
    if job.rank == 0:
        try:
            text = Path(path).read_text("utf-8")
            Table.loads(text)
        except (OSError, ValueError) as error:
            flaw = f"{error.strerror}" if isinstance(error, OSError) else str(error)
    text, flaw = text_of_first(job, inner, text), text_of_first(job, inner, flaw)
    if flaw:
        raise ConfigError(f"{PATH}.table: cannot use {path}: {flaw}")
    table, here = Table.loads(text), cluster_of(job, inner, hosts)
    if dict(table.cluster) != here:
        raise ConfigError(
            f"{PATH}.table: {path} was measured on another cluster, {_told(table.cluster)}; this "
            f"one is {_told(here)}; measure it with `drivetrain comm tune`"
        )
    return table


def _told(cluster: Mapping[str, Any]) -> str:
    ranks = " + ".join(map(str, cluster.get("ranks_of_hosts", ["?"])))
    return f"{ranks} ranks on hosts of {', '.join(cluster.get('machines', ['?']))}"
