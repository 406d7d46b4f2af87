"""An axis of ranks that share sequences, for tests whose own code cuts these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from drivetrain.contracts.plugin.plugin import Plugin, Sections, hookimpl
from drivetrain.contracts.plugin.section import PositiveInt, Scalar
from drivetrain.contracts.world.axis import Atom, AxisRequest


class SharedSequencesSize(Scalar[PositiveInt]):
    """Ranks that share one sequence."""

    root: PositiveInt = 1


class SharedSequences(Plugin):
    """Serves ``sequence_parallel_size``, and leaves it to others to share sequences out."""

    name = "sequence_parallel_size"
    sections: ClassVar[Sections] = {"sequence_parallel_size": SharedSequencesSize}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("sp", self.section(SharedSequencesSize).root, source=self.name)]
