"""Sizes of mesh axes that are given directly, and the wish for an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from drivetrain.contracts.plugin.plugin import Plugin, Sections, hookimpl
from drivetrain.contracts.plugin.section import PositiveInt, Scalar
from drivetrain.contracts.world.axis import Atom, AxisRequest


class DataParallelSize(Scalar[PositiveInt | None]):
    """Data shards; by default what the other axes leave of the world."""

    root: PositiveInt | None = None


class AcceleratorName(Scalar[str]):
    """The accelerator to use by name; ``auto`` takes the one that is present."""

    root: str = "auto"


class Mesh(Plugin):
    """Declares the atom ``dp`` where the config sizes it."""

    name = "mesh"
    sections: ClassVar[Sections] = {
        "data_parallel_size": DataParallelSize,
        "accelerator": AcceleratorName,
    }

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        size = self.section(DataParallelSize).root
        return [] if size is None else [Atom("dp", size, source="data_parallel_size")]
