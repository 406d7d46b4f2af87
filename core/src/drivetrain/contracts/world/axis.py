"""Mesh axes: atoms, names for sets of them, and parts of them."""

from __future__ import annotations

from dataclasses import dataclass, field

ATOMS = ("pp", "dp", "sp", "tp")
"""Atomic axes, outermost first; their product is the world."""


@dataclass(frozen=True)
class Atom:
    """The size of one atomic axis. ``dp`` may be left out: it is what the others leave over.

    Args:
        name: one of :data:`ATOMS`.
        size: ranks along it.
        source: where the size comes from, e.g. a config path, for error messages.
    """

    name: str
    size: int
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class NamedAxis:
    """A name for a set of atoms, e.g. ``data`` = ``("dp", "sp")``."""

    name: str
    atoms: tuple[str, ...]
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class SplitAxis:
    """An axis of a given size made of the innermost allowed atoms.

    Args:
        name: e.g. ``"ep"``.
        size: ranks along it.
        within: allowed atoms, in the order in which they are taken. Each is taken whole until the
            size is reached; the last one is split, its inner part taken. ``ep`` takes
            ``("sp", "dp")``, or ``("tp", "sp", "dp")`` when it is folded over tensor parallelism.
        complement: name of the axis of what is left of the allowed atoms, e.g. ``"edp"``.
        source: where the size comes from, e.g. a config path, for error messages.
    """

    name: str
    size: int
    within: tuple[str, ...] = ("sp", "dp")
    complement: str = "edp"
    source: str = field(default="", compare=False)


AxisRequest = Atom | NamedAxis | SplitAxis


@dataclass(frozen=True)
class SubAxis:
    """Some positions of an axis, e.g. the first and last pipeline stage, which share a weight."""

    axis: str | tuple[str, ...]
    positions: tuple[int, ...]


Axis = str | tuple[str, ...] | SubAxis
"""An axis name, several names (their product), or some positions of either."""
