"""Names of the mesh axes along which experts are shared out; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from drivetrain.contracts import SplitAxis


@dataclass(frozen=True)
class ExpertAxes:
    """Axes for layers whose experts are shared out over one number of ranks.

    Args:
        size: that number.
        experts: axis whose ranks have other experts; the empty string for one rank.
        copies: axis whose ranks have copies of the same experts.
        alike: axis whose ranks have the same tokens, and share them out before they travel; the
            empty string if each of them sends all.
    """

    size: int
    experts: str
    copies: str
    alike: str = ""


def expert_axes(sizes: Iterable[int], *, over_tensor: bool = False) -> dict[int, ExpertAxes]:
    """Name the axes for each number of ranks: ``ep`` and ``edp`` for the largest.

    Args:
        sizes: numbers of ranks.
        over_tensor: whether ranks of ``tp`` share out experts, and with them their tokens.

    Returns:
        Number of ranks -> axes; always with those for 1.
    """
    found = {1: ExpertAxes(1, "", "data")}
    wanted = sorted(set(sizes) - {1}, reverse=True)
    for place, size in enumerate(wanted):
        end = f"_{size}" if place else ""
        alike = "tp" if over_tensor else ""
        found[size] = ExpertAxes(size, f"ep{end}", f"edp{end}", alike)
    return found


def requests(axes: Iterable[ExpertAxes], sources: dict[int, str]) -> Sequence[SplitAxis]:
    """Ask for the axes: the innermost ranks that have other tokens, or a share of the same ones.

    Args:
        axes: of :func:`expert_axes`.
        sources: number of ranks -> where it comes from, for messages.
    """
    return [
        SplitAxis(
            a.experts,
            a.size,
            (*filter(None, [a.alike]), "sp", "dp"),
            a.copies,
            sources.get(a.size, ""),
        )
        for a in axes
        if a.experts
    ]
