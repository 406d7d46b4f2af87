"""Which ranks of an axis share a node, and the two hops in which a sum can cross nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drivetrain.contracts import Axis, SubAxis


@dataclass(frozen=True)
class Hops:
    """Two axes that together connect all ranks of one: first inside a node, then across nodes.

    Args:
        inside: this rank and those of the same node.
        across: this rank and those of the same place in the other nodes.
        order: positions along the whole axis, by place in the node, then by node.
    """

    inside: Axis
    across: Axis
    order: tuple[int, ...]


def find_hops(axis: Axis, nodes: Sequence[int], position: int) -> Hops | None:
    """How a sum over ``axis`` travels in two hops; ``None`` where one hop is as good.

    One hop it is on a single node, with one rank per node, and where nodes hold different numbers
    of the axis's ranks, or hold them in different orders.

    Args:
        axis: the whole axis.
        nodes: the node of each of its positions.
        position: this rank's.
    """
    if isinstance(axis, SubAxis):
        return None
    members: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        members.setdefault(node, []).append(place)
    rows = list(members.values())
    columns = list(zip(*rows, strict=False))
    even = len({len(row) for row in rows}) == 1
    if len(rows) == 1 or len(rows[0]) == 1 or not even:
        return None
    if any(tuple(sorted(column)) != column for column in columns):
        return None
    mine = rows[list(members).index(nodes[position])]
    return Hops(
        inside=SubAxis(axis, tuple(mine)),
        across=SubAxis(axis, columns[mine.index(position)]),
        order=tuple(place for column in columns for place in column),
    )
