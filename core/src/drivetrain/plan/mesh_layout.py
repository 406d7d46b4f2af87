"""Which ranks form which axis: pure arithmetic on a world size, no torch and no processes.

A rank is a number in a mixed radix whose digits are the *atoms* ``pp, dp, sp, tp``, outermost
first. Every axis is a set of digits, each ``(size, stride)``: coordinate ``rank // stride % size``.
An axis that takes only a part of an atom (expert parallelism over half of ``dp``) splits its digit
in two. Queries cost as much as their answer, never as much as the world.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

from drivetrain.contracts.world.axis import ATOMS, Atom, NamedAxis, SubAxis
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis, AxisRequest, SplitAxis


class Digit(NamedTuple):
    """One digit of an axis: its coordinate is ``rank // stride % size``."""

    size: int
    stride: int


_BUILT_IN = (
    NamedAxis("data", ("dp", "sp")),
    NamedAxis("model", ("pp", "tp")),
    NamedAxis("world", ATOMS),
)


@dataclass(frozen=True)
class MeshLayout:
    """The axes of a world of ranks.

    Positions along an axis count in order of rank, whatever order its names are given in.

    Args:
        world_size: number of ranks.
        axes: axis name -> digits, outermost first; digits of size 1 are left out.
    """

    world_size: int
    axes: Mapping[str, tuple[Digit, ...]]

    @classmethod
    def build(cls, world_size: int, requests: Sequence[AxisRequest] = ()) -> MeshLayout:
        """Lay out ``world_size`` ranks.

        The axes ``data``, ``model`` and ``world`` always exist. Equal requests may repeat.

        Raises:
            ConfigError: with the arithmetic, when sizes do not multiply to the world or do not
                nest; when a name is unknown or requested twice with different meanings.
        """
        if world_size < 1:
            raise ConfigError(f"the world must have at least one rank, got {world_size}")
        requests = (*_BUILT_IN, *requests)
        atoms = _atoms(world_size, [r for r in requests if isinstance(r, Atom)])
        axes = {name: _digits(digit) for name, digit in atoms.items()}
        sources: dict[str, AxisRequest] = {}
        for request in requests:
            if isinstance(request, Atom):
                continue
            for name, digits in _request_axes(atoms, request):
                if name in ATOMS or sources.get(name, request) != request:
                    raise ConfigError(
                        f"mesh axis {name!r} is requested twice with different meanings: "
                        f"{sources.get(name, 'an atom')} and {request}"
                    )
                sources[name] = request
                axes[name] = digits
        return cls(world_size, axes)

    def size(self, axis: Axis) -> int:
        """Number of ranks along ``axis``."""
        if isinstance(axis, SubAxis):
            return len(axis.positions)
        return prod(digit.size for digit in self.digits(axis))

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of ``rank`` along ``axis``.

        Raises:
            ConfigError: ``rank`` is not one of the positions of a :class:`SubAxis`.
        """
        if isinstance(axis, SubAxis):
            position = self.coordinate(rank, axis.axis)
            if position not in axis.positions:
                raise ConfigError(
                    f"rank {rank} is at position {position} of axis {axis.axis!r}, "
                    f"which is not among {axis.positions}"
                )
            return axis.positions.index(position)
        coordinate = 0
        for size, stride in self.digits(axis):
            coordinate = coordinate * size + rank // stride % size
        return coordinate

    def group(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axis``, in order of position."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is not in a world of {self.world_size} ranks")
        if isinstance(axis, SubAxis):
            ranks = self.group(rank, axis.axis)
            return tuple(ranks[position] for position in axis.positions)
        digits = self.digits(axis)
        first = rank - sum(rank // stride % size * stride for size, stride in digits)
        return tuple(first + offset for offset in _offsets(digits))

    def sub_axis(self, axis: str | tuple[str, ...], positions: Sequence[int]) -> SubAxis:
        """Some positions of ``axis``, checked and in ascending order.

        Raises:
            ConfigError: a position is out of range or repeats.
        """
        size = self.size(axis)
        ordered = tuple(sorted(positions))
        if not ordered or len(set(ordered)) != len(ordered):
            raise ConfigError(
                f"positions {ordered} of axis {axis!r} must be distinct and not empty"
            )
        if ordered[0] < 0 or ordered[-1] >= size:
            raise ConfigError(f"positions {ordered} are not all in axis {axis!r} of size {size}")
        return SubAxis(axis, ordered)

    def rest(self, axes: Iterable[Axis]) -> tuple[str, ...]:
        """Names of axes that make up the world together with ``axes``: atoms where they do.

        Raises:
            ConfigError: some of ``axes`` share ranks, or no axes make up what they leave over.
        """
        used: list[str] = []
        for axis in axes:
            names = axis.axis if isinstance(axis, SubAxis) else axis
            used += (names,) if isinstance(names, str) else names
        left = self.world_size // self.size(tuple(used))
        found: list[str] = []
        for name in (*ATOMS, *sorted(self.axes, key=self.size, reverse=True)):
            if self.size(name) > 1 and not self.overlap(*used, *found, name):
                found.append(name)
        if self.size(tuple(found)) != left:
            raise ConfigError(f"no mesh axes make up the {left} ranks beside axes {tuple(used)}")
        return tuple(found)

    def overlap(self, *axes: str | tuple[str, ...]) -> bool:
        """Whether some of ``axes`` share ranks beside the one that all go through."""
        names = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)]
        return any(o.stride % (i.size * i.stride) for o, i in pairwise(self._joined(names)))

    def digits(self, axis: str | tuple[str, ...]) -> tuple[Digit, ...]:
        """The digits of ``axis``, outermost first.

        Raises:
            ConfigError: a name is unknown, or two names share ranks.
        """
        if isinstance(axis, str):
            return self._named(axis)
        if len(axis) == 1:
            return self._named(axis[0])
        if self.overlap(*axis):
            raise ConfigError(
                f"mesh axes {axis} overlap, so they have no product: "
                + ", ".join(f"{name} = {self.group(0, name)[:8]}" for name in axis)
            )
        return self._joined(axis)

    def _joined(self, names: Iterable[str]) -> tuple[Digit, ...]:
        digits = (digit for name in names for digit in self._named(name))
        return tuple(sorted(digits, key=_outer))

    def _named(self, name: str) -> tuple[Digit, ...]:
        try:
            return self.axes[name]
        except KeyError:
            known = ", ".join(self.axes)
            raise ConfigError(f"unknown mesh axis {name!r}; this job has {known}") from None


def _outer(digit: Digit) -> int:
    """A key by which outer digits come first."""
    return -digit.stride


def _atoms(world_size: int, requests: Sequence[Atom]) -> dict[str, Digit]:
    """Size and stride of every atom, with ``dp`` filled from the world when it is not given."""
    given: dict[str, Atom] = {}
    for atom in requests:
        if atom.name not in ATOMS:
            raise ConfigError(
                f"{_at(atom)}unknown mesh atom {atom.name!r}: atoms are {', '.join(ATOMS)}; "
                "other axes are named sets or splits of these"
            )
        if atom.size < 1:
            raise ConfigError(f"{_at(atom)}mesh atom {atom.name!r} needs a size of at least 1")
        if given.setdefault(atom.name, atom) != atom:
            first = given[atom.name]
            raise ConfigError(
                f"mesh atom {atom.name!r} has two sizes: "
                f"{_at(first)}{first.size} and {_at(atom)}{atom.size}"
            )
    sizes = {name: given[name].size if name in given else 1 for name in ATOMS}
    used = prod(sizes.values())
    arithmetic = " x ".join(f"{name} {size}" for name, size in sizes.items() if name in given)
    if "dp" in given and used != world_size:
        raise ConfigError(
            f"the mesh {arithmetic} needs {used} ranks, but the world has {world_size}"
        )
    if world_size % used:
        raise ConfigError(
            f"{world_size} ranks cannot be divided into parts of {arithmetic} = {used} ranks: "
            f"{world_size} / {used} leaves {world_size % used}"
        )
    if "dp" not in given:
        sizes["dp"] = world_size // used
    strides = {name: prod(sizes[inner] for inner in ATOMS[i + 1 :]) for i, name in enumerate(ATOMS)}
    return {name: Digit(sizes[name], strides[name]) for name in ATOMS}


def _request_axes(
    atoms: Mapping[str, Digit], request: NamedAxis | SplitAxis
) -> list[tuple[str, tuple[Digit, ...]]]:
    """The axes that a request defines: one, or a split and its complement."""
    names = request.atoms if isinstance(request, NamedAxis) else request.within
    for name in names:
        if name not in ATOMS:
            raise ConfigError(
                f"{_at(request)}mesh axis {request.name!r} is made of {name!r}, which is no atom "
                f"({', '.join(ATOMS)})"
            )
    if isinstance(request, NamedAxis):
        return [(request.name, _digits(*(atoms[name] for name in set(names))))]
    inner, outer = _split(atoms, request)
    return [(request.name, _digits(*inner)), (request.complement, _digits(*outer))]


def _split(atoms: Mapping[str, Digit], request: SplitAxis) -> tuple[list[Digit], list[Digit]]:
    """Digits taken by a split axis, and digits left over."""
    inner: list[Digit] = []
    outer: list[Digit] = []
    missing = request.size
    for name in request.within:
        size, stride = atoms[name]
        taken = gcd(missing, size)
        # An atom is taken whole before the next is touched, and only the last one is split.
        if missing < 1 or taken != min(missing, size):
            raise ConfigError(_does_not_nest(atoms, request, name, missing))
        inner.append(Digit(taken, stride))
        outer.append(Digit(size // taken, stride * taken))
        missing //= taken
    if missing != 1:
        raise ConfigError(_does_not_nest(atoms, request, request.within[-1], missing))
    return inner, outer


def _does_not_nest(atoms: Mapping[str, Digit], request: SplitAxis, name: str, missing: int) -> str:
    sizes = " x ".join(f"{atom} {atoms[atom].size}" for atom in request.within)
    total = prod(atoms[atom].size for atom in request.within)
    return (
        f"{_at(request)}{request.name} {request.size} does not nest in {sizes} = {total} ranks: "
        f"at {name}, {missing} is left to be made of {atoms[name].size}"
    )


def _digits(*digits: Digit) -> tuple[Digit, ...]:
    """Outermost first, without digits of size 1, neighbours merged: one form for equal axes."""
    merged: list[Digit] = []
    for digit in sorted((d for d in digits if d.size > 1), key=_outer):
        if merged and merged[-1].stride == digit.size * digit.stride:
            digit = Digit(merged.pop().size * digit.size, digit.stride)
        merged.append(digit)
    return tuple(merged)


def _offsets(digits: tuple[Digit, ...]) -> list[int]:
    """Every sum of digit values, in ascending order."""
    offsets = [0]
    for size, stride in digits:
        offsets = [offset + i * stride for offset in offsets for i in range(size)]
    return offsets


def _at(request: AxisRequest) -> str:
    return f"{request.source}: " if request.source else ""
