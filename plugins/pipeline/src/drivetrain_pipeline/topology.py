"""Grids of ranks as scripts of DeepSpeed describe them: axes with names, the last one innermost."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

from drivetrain.errors import ConfigError


class ProcessTopology:
    """A grid of ranks, in row-major order: neighbours along the last axis have adjacent ranks.

    Args:
        axes: names, the outermost first.
        dims: how many ranks each axis has.

    Raises:
        ConfigError: there are not as many sizes as axes, a name occurs twice, or a size is below 1.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes, self.dims = list(axes), list(dims)
        if len(self.axes) != len(self.dims) or len(set(self.axes)) != len(self.axes):
            raise ConfigError(f"a topology needs one size for each axis: {self.axes}, {self.dims}")
        if any(size < 1 for size in self.dims):
            raise ConfigError(f"the sizes of axes must be positive, got {self.dims}")
        self.ProcessCoord = _place_of(self.axes)
        places = product(*(range(size) for size in self.dims))
        self.mapping: dict[Any, int] = {
            self.ProcessCoord(*place): rank for rank, place in enumerate(places)
        }
        self._places = list(self.mapping)

    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._places)

    def get_axis_names(self) -> list[str]:
        """The axes, the outermost first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Number of ranks along an axis; 0 for one that there is not."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a place.

        Args:
            coord_kwargs: one number for every axis.

        Raises:
            ConfigError: an axis is missing or unknown, or there is no such place.
        """
        place = self._place(coord_kwargs)
        if len(coord_kwargs) != len(self.axes):
            raise ConfigError(f"a rank has a place on every axis of {self.axes}; use filter_match")
        rank = self.mapping.get(self.ProcessCoord(**place))
        if rank is None:
            raise ConfigError(f"no rank is at {place} of a grid {self}")
        return rank

    def get_coord(self, rank: int) -> Any:
        """The place of a rank, with its axes as attributes.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < len(self._places):
            raise ConfigError(f"rank {rank} is not among the {len(self._places)} of a grid {self}")
        return self._places[rank]

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """The place of a rank as a name for files, such as ``model_01``.

        Args:
            rank: whose place.
            omit_axes: axes that are left out.
            inner_sep: between an axis and its number.
            outer_sep: between axes.
        """
        place = self.get_coord(rank)
        shown = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(place, axis):02d}" for axis in shown)

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The ranks of every group along an axis; nothing for an axis that there is not."""
        if axis not in self.axes:
            return []
        groups: dict[tuple[int, ...], list[int]] = {}
        at = self.axes.index(axis)
        for rank, place in enumerate(self._places):
            groups.setdefault((*place[:at], *place[at + 1 :]), []).append(rank)
        return list(groups.values())

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks at a number on each of some axes, ascending."""
        wanted = self._place(filter_kwargs)
        return [
            rank
            for rank, place in enumerate(self._places)
            if all(getattr(place, axis) == number for axis, number in wanted.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at number ``idx`` on an axis, ascending."""
        return self.filter_match(**{axis: idx})

    def __str__(self) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.dims, strict=True))

    def _place(self, given: dict[str, int]) -> dict[str, int]:
        if unknown := given.keys() - set(self.axes):
            raise ConfigError(f"no axis {', '.join(sorted(unknown))} in a grid {self}")
        return given


def _place_of(axes: Sequence[str]) -> Any:
    """A class of tuples with the axes as attributes."""
    return namedtuple("ProcessCoord", axes)


class PipeDataParallelTopology(ProcessTopology):
    """Stages, and data shards inside each of them.

    Args:
        num_pp: stages.
        num_dp: data shards.
    """

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages, data shards inside each of them, and tensor-parallel ranks inside each of those.

    Args:
        num_pp: stages.
        num_mp: tensor-parallel ranks.
        num_dp: data shards.
    """

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])
