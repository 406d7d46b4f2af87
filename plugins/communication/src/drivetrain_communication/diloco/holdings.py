"""What a rank has of the trained weights, as flat fp32 tensors, one per part that travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from drivetrain.checkpoint.redistribute import redistribute
from drivetrain.contracts import Box, Fragment
from drivetrain_communication.diloco.calendar import Calendar

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

_KINDS = ("master", "parameter")
"""Where weights lie, the more precise ones first."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in the flat ones.

    Args:
        name: of the parameter.
        shape: of the whole.
        boxes: which parts of it this rank counts as its own.
        start: of its first element.
        numel: elements held.
    """

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    start: int
    numel: int


class Holdings:
    """The weights that this rank counts as its own, read and written through fragments.

    Every element of the model is some rank's own, once. So ZeRO's shards travel as shards, and of
    copies only the first does; ranks with other copies get the values from it.

    Args:
        engine: whose weights they are.
        calendar: which parameter is in which fragment.
    """

    def __init__(self, engine: Engine, calendar: Calendar) -> None:
        self._engine, self._calendar = engine, calendar
        engine.states.flush()
        wide = torch.float32
        self._places: list[list[_Place]] = [[] for _ in range(calendar.fragments)]
        sizes = [0] * calendar.fragments
        for fragment in self._own():
            part = calendar.fragment_of(fragment.name)
            numel = sum(box.numel for box in fragment.boxes)
            place = _Place(fragment.name, fragment.global_shape, fragment.boxes, sizes[part], numel)
            self._places[part].append(place)
            sizes[part] += numel
            if fragment.dtype == torch.float64:
                wide = torch.float64
        self.dtype, self.sizes = wide, tuple(sizes)

    @property
    def layout(self) -> int:
        """A number that is the same where counterparts have the same parts of the model."""
        return crc32(repr((self._places, self.dtype)).encode())

    def is_current(self) -> bool:
        """Whether the engine still has the same parts of the same parameters to train."""
        places = {place.name: place.boxes for part in self._places for place in part}
        return {f.name: f.boxes for f in self._own()} == places

    def read(self, part: int) -> torch.Tensor:
        """The weights of fragment ``part``, a copy in host memory."""
        self._engine.states.flush()
        flat = torch.empty(self.sizes[part], dtype=self.dtype)
        own = {fragment.name: fragment for fragment in self._own()}
        for place in self._places[part]:
            flat.narrow(0, place.start, place.numel).copy_(own[place.name].read())
        return flat

    def write(self, values: Sequence[torch.Tensor | None]) -> None:
        """Overwrite weights on all ranks that have copies. Collective.

        Args:
            values: one flat tensor per fragment; ``None`` for those that stay.
        """
        engine, source = self._engine, []
        for places, flat in zip(self._places, values, strict=True):
            for place in places if flat is not None else ():
                assert flat is not None
                source += [fragment_of(place, kind, flat) for kind in _KINDS]
        wanted = [
            fragment
            for fragment in engine.states.fragments()
            if fragment.kind in _KINDS
            and fragment.name in engine.states.steps()
            and values[self._calendar.fragment_of(fragment.name)] is not None
        ]
        redistribute(engine.job, source, wanted)
        engine.states.fragments_written()

    def as_fragments(self, part: int, flat: torch.Tensor, prefix: str) -> list[Fragment]:
        """``flat``, which lies like fragment ``part``, for checkpoints."""
        return [
            replace(fragment_of(place, "state", flat), name=f"{prefix}{place.name}")
            for place in self._places[part]
        ]

    def _own(self) -> list[Fragment]:
        """The best fragment of each trained parameter that this rank counts as its own."""
        trained = self._engine.states.steps()
        best: dict[str, Fragment] = {}
        for fragment in self._engine.states.fragments():
            if fragment.kind not in _KINDS or fragment.name not in trained:
                continue
            if fragment.owner and fragment.boxes and fragment.dtype.is_floating_point:
                known = best.get(fragment.name)
                if known is None or _KINDS.index(fragment.kind) < _KINDS.index(known.kind):
                    best[fragment.name] = fragment
        return sorted(best.values(), key=lambda fragment: fragment.name)


def fragment_of(place: _Place, kind: str, flat: torch.Tensor) -> Fragment:
    """One tensor's slice of ``flat`` as a fragment."""
    part = flat.narrow(0, place.start, place.numel)
    return Fragment(
        place.name,
        kind,
        place.shape,
        flat.dtype,
        place.boxes,
        True,
        "host",
        read=part.detach,
        write=partial(_overwrite, part),
    )


def _overwrite(part: torch.Tensor, values: torch.Tensor) -> None:
    part.copy_(values)
