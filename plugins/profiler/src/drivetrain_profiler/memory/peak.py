"""The moment at which a step has most memory, and what is there then."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drivetrain_profiler.memory.watch import BEFORE, UNKNOWN, Change, Piece

_POINTS = 500
"""Of the curve over the step that is written down."""

_MIB = 1 << 20

_ITSELF = "the model itself"
"""What runs in no module inside of it, or in the script."""


@dataclass
class Peak:
    """What a device holds at the peak of a step.

    Args:
        step: number of the step, from 1.
        rank: whose device.
        device: its name.
        nbytes: of all tensors at the peak.
        begin: bytes of tensors when the step began.
        counted: the most that the accelerator has counted in the step. On a CPU that is the whole
            process.
        phase: in which the peak is.
        module: in which module's forward or backward.
        operator: whose result made it the peak.
        pieces: what is there, the largest first.
        curve: bytes of tensors over the step, in order of what came and went.
    """

    step: int
    rank: int
    device: str
    nbytes: int
    begin: int
    counted: int
    phase: str
    module: str
    operator: str
    pieces: Sequence[Piece]
    curve: Sequence[int]

    def data(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def text(self, top: int) -> str:
        """A table for people; ``top`` modules and tensors are listed."""
        where = f"{self.phase} of {self.module or _ITSELF}"
        operator = f" ({self.operator})" if self.operator else ""
        lines = [
            f"memory of {self.device} at the peak of step {self.step}, rank {self.rank}",
            f"  tensors at the peak     {_mib(self.nbytes)}, in {where}{operator}",
            f"  tensors before the step {_mib(self.begin)}",
            f"  the accelerator counts  {_mib(self.counted)} at most",
            "",
            *self._by_kind(),
            "",
            *self._by_module(top),
            "",
            *self._largest(top),
        ]
        return "\n".join(lines) + "\n"

    def _by_kind(self) -> list[str]:
        kinds: Counter[str] = Counter()
        for piece in self.pieces:
            kinds[piece.kind] += piece.nbytes
        lines = [f"{'kind':26}{'MiB':>12}{'share':>9}"]
        lines += [
            f"{kind:26}{n / _MIB:12,.3f}{n / self.nbytes:9.1%}" for kind, n in kinds.most_common()
        ]
        return [*lines, f"{'all':26}{self.nbytes / _MIB:12,.3f}{1:9.1%}"]

    def _by_module(self, top: int) -> list[str]:
        """What modules have made in this step, and all inside of them."""
        passing: dict[str, Counter[str]] = defaultdict(Counter)
        for piece in self.pieces:
            if piece.module:
                parts = piece.module.split(".")
                for depth in range(1, len(parts) + 1):
                    passing[".".join(parts[:depth])][piece.phase] += piece.nbytes
        phases = ("forward", "recompute", "backward")
        ordered = sorted(passing.items(), key=lambda item: (-item[1].total(), item[0]))
        lines = ["made in this step, by module and phase, with all that is inside (MiB)"]
        width = max([26, *(len(name) + 2 for name, _ in ordered[:top])])
        lines.append(f"{'module':{width}}" + "".join(f"{phase:>12}" for phase in phases))
        for name, sums in ordered[:top]:
            lines.append(
                f"{name:{width}}" + "".join(f"{sums[phase] / _MIB:12,.3f}" for phase in phases)
            )
        return [*lines, *_rest(len(ordered) - top, "modules")]

    def _largest(self, top: int) -> list[str]:
        lines = [f"{'MiB':>12}  {'kind':22}{'made in':11}where, operator, shape of the tensor"]
        for piece in self.pieces[:top]:
            where = piece.name or piece.module or ("" if piece.phase == BEFORE else _ITSELF)
            shape = f"{piece.dtype} {list(piece.shape)}"
            told = ", ".join(filter(None, (where, piece.operator, shape)))
            lines.append(f"{piece.nbytes / _MIB:12,.3f}  {piece.kind:22}{piece.phase:11}{told}")
        return [*lines, *_rest(len(self.pieces) - top, "tensors")]


def peak_of(
    pieces: Sequence[Piece], changes: Sequence[Change], *, begin: int
) -> tuple[int, Change, list[Piece], list[int]]:
    """Find the peak by playing back what came and went.

    Args:
        pieces: all memory that was seen.
        changes: of it, in order.
        begin: how many of the changes were before the step.

    Returns:
        Bytes at the peak, the change that made it, the memory that was there, the largest first
        and with its size then, and bytes after each change of the step (some hundreds of them).
    """
    total, most, at = sum(change.nbytes for change in changes[:begin]), 0, max(begin - 1, 0)
    curve = [total]
    most = total
    for number, change in enumerate(changes[begin:], begin):
        total += change.nbytes
        curve.append(total)
        if total > most:
            most, at = total, number
    sizes: Counter[int] = Counter()
    for change in changes[: at + 1]:
        sizes[change.piece] += change.nbytes
    there = []
    for number, nbytes in sizes.items():
        if nbytes > 0:
            piece = pieces[number]
            kind = piece.kind or UNKNOWN[piece.phase]
            there.append(Piece(**{**asdict(piece), "nbytes": nbytes, "kind": kind}))
    there.sort(key=lambda piece: -piece.nbytes)
    return most, changes[at], there, _thinned(curve)


def _thinned(curve: Sequence[int]) -> list[int]:
    """Not more than some hundred points: the highest of each stretch."""
    stretch = -(-len(curve) // _POINTS)
    return [max(curve[start : start + stretch]) for start in range(0, len(curve), stretch)]


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:,.3f} MiB"


def _rest(count: int, what: str) -> list[str]:
    return [f"  and {count} more {what}"] if count > 0 else []
