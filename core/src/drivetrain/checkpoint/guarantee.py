"""What a checkpoint promises of the run that goes on from it, and what not, with reasons."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain.wording import printable

if TYPE_CHECKING:
    from drivetrain.checkpoint.subject import Subject
    from drivetrain.contracts.state.fragment import Fragment

BITWISE = "bitwise"
IDENTICAL = "state bit-identical, sample order identical"


@dataclass
class Guarantee:
    """The grade of a resume, and all that is weaker.

    Args:
        same_layout: whether ranks, axes and every rank's fragments are those of the save.
        weaker: what is not as the grade says, each with its reason.
    """

    same_layout: bool
    weaker: dict[str, None] = field(default_factory=dict)

    def weaken(self, *reasons: str) -> None:
        """Add what is weaker."""
        self.weaker.update(dict.fromkeys(map(printable, reasons)))  # some come from a file

    def __str__(self) -> str:
        grade = f"same layout: {BITWISE}" if self.same_layout else f"reshaped: {IDENTICAL}"
        return f"{grade}{_except(self.weaker)}"


def promise(weaker: Iterable[str], weaker_reshaped: Iterable[str]) -> str:
    """What a checkpoint promises when it is saved.

    Args:
        weaker: what is weaker in any layout.
        weaker_reshaped: what is weaker in another layout.
    """
    reshaped = [*weaker, *weaker_reshaped]
    return (
        f"resumes in the same layout: {BITWISE}{_except(weaker)}; "
        f"in another: {IDENTICAL}{_except(reshaped)}"
    )


def layout_of(engine: Subject) -> dict[str, Any]:
    """Ranks and axes of an engine's job."""
    mesh = engine.job.mesh
    axes = {axis: mesh.size(axis) for axis in ("pp", "dp", "sp", "tp")}
    return {"world_size": engine.job.world_size, "axes": axes}


def fragments_digest(fragments: Iterable[Fragment]) -> str:
    """A digest of what a rank holds of which tensor, in which dtype."""
    facts = sorted(
        repr((f.kind, f.name, f.global_shape, str(f.dtype), f.boxes, f.owner)) for f in fragments
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def changed_versions(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may compute other bits than where the checkpoint was saved."""
    return [
        f"{what} was {saved[what]} and is {value}, which may round differently"
        for what, value in now.items()
        if what in saved and saved[what] != value
    ]


def _except(reasons: Iterable[str]) -> str:
    listed = "; ".join(reasons)
    return f", except: {listed}" if listed else ""
