"""Sizes of mesh axes that are given directly, and the wish for an accelerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts.plugin.plugin import Plugin, Problem, Sections, hookimpl
from drivetrain.contracts.plugin.section import PositiveInt, Scalar
from drivetrain.contracts.world.axis import Atom, AxisRequest

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan


class DataParallelSize(Scalar[PositiveInt | None]):
    """Data shards; by default what the other axes leave of the world."""

    root: PositiveInt | None = None


class SequenceParallelSize(Scalar[PositiveInt | None]):
    """Ranks that share one sequence; 1 if unset."""

    root: PositiveInt | None = None


class AcceleratorName(Scalar[str]):
    """The accelerator to use by name; ``auto`` takes the one that is present."""

    root: str = "auto"


class Mesh(Plugin):
    """Declares the atoms ``dp`` and ``sp`` where the config sizes them.

    Core itself gives the ranks of one sequence nothing to share: a plan that has several needs a
    plugin that does, or a caller.
    """

    name = "mesh"
    sections: ClassVar[Sections] = {
        "data_parallel_size": DataParallelSize,
        "sequence_parallel_size": SequenceParallelSize,
        "accelerator": AcceleratorName,
    }

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        sizes = {
            ("dp", "data_parallel_size"): self.section(DataParallelSize).root,
            ("sp", "sequence_parallel_size"): self.section(SequenceParallelSize).root,
        }
        return [
            Atom(atom, size, source=path)
            for (atom, path), size in sizes.items()
            if size is not None
        ]

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        size = self.section(SequenceParallelSize).root or 1
        if size == 1 or "sp" in plan.serves_axes.union(*(p.serves_axes for p in plan.plugins)):
            return []
        who = plan.registry.missing("plugins", "sequence_parallel")
        return [
            Problem(
                "sequence_parallel_size",
                f"{size} ranks would share each sequence (axis 'sp'), but no plugin of this config "
                "computes with parts of sequences, so all would do the same work: add the section "
                f"of one that does{f' (sequence_parallel, {who})' if who else ''}, or leave this "
                "key out",
            )
        ]

    def features(self) -> Mapping[str, object]:
        return {"sequence_parallel_size": self.section(SequenceParallelSize).root or 1}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {"sequence_parallel_size": (1, 2)}
