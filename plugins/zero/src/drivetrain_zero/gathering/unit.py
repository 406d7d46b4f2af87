"""Parameters of a model that are gathered and released together.

[Note: a unit's life] A unit is in one :class:`UnitState`, and has any number of :class:`Reason` to
stay whole. What asks for a unit moves it towards ``WHOLE``; :meth:`GatheredUnit.release` moves it
back to ``SHARDED``, unless there is a reason. See the diagram in the README.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.states.units import units
from drivetrain_zero.gathering.backward_hooks import beneath_transforms

if TYPE_CHECKING:
    from drivetrain_zero.gathering.backward_hooks import InputsKnown
    from drivetrain_zero.shards.bucket import ShardedBucket


class UnitState(Enum):
    """How much of a unit is there."""

    SHARDED = auto()
    """Its parameters read as NaN."""
    FETCHING = auto()
    """This rank's shards are on their way from a home that keeps parameters."""
    COMING = auto()
    """Its gather has begun."""
    WHOLE = auto()
    """Its parameters have their values."""
    LEFT = auto()
    """It is whole, but released on ranks that have no reason to keep it: all take part in the next
    gather of it."""


class Reason(Enum):
    """Why a unit stays whole after its use."""

    PERSISTENT = auto()
    """It is so small that it always does."""
    PINNED = auto()
    """A script uses its parameters inside ``drivetrain.whole``."""
    UPDATE = auto()
    """Parameters stay whole from their first use to the next update."""
    HELD = auto()
    """This rank uses it where no hook tells how long: until backward is over."""
    BACKWARD = auto()
    """A backward that comes soon needs it again; the next release is the one after that."""


_ON_ALL_RANKS = {Reason.PERSISTENT, Reason.PINNED, Reason.UPDATE}


@dataclass(eq=False)
class GatheredUnit:
    """Parameters that are gathered together.

    Args:
        number: position in the module's order; 0 is the root.
        name: path of the module; empty for the root.
        module: whose forward needs them.
        parameters: its own, which no other unit has.
        buckets: where they lie.
        state: how much of it is there.
        reasons: why it stays whole.
        inputs: of the forward under way, until its outputs are known.
    """

    number: int
    name: str
    module: nn.Module
    parameters: Sequence[nn.Parameter]
    buckets: list[ShardedBucket] = field(default_factory=list)
    state: UnitState = UnitState.SHARDED
    reasons: set[Reason] = field(default_factory=set)
    inputs: InputsKnown | None = None
    _pins: list[bool] = field(default_factory=list)  # for each, whether the unit was whole before

    @property
    def numel(self) -> int:
        """Elements of the whole unit."""
        return sum(bucket.packing.numel for bucket in self.buckets)

    @property
    def is_whole(self) -> bool:
        """True if the parameters have their values."""
        return self.state in (UnitState.WHOLE, UnitState.LEFT)

    @property
    def is_due(self) -> bool:
        """True if the unit takes part in the next gather of it."""
        return self.state not in (UnitState.COMING, UnitState.WHOLE)

    def fetch_ahead(self) -> None:
        """Begin to bring this rank's shards to the device, if they are kept elsewhere."""
        if self.state is UnitState.SHARDED:
            for bucket in self.buckets:
                bucket.whole.fetch_ahead()
            self.state = UnitState.FETCHING

    def start(self, *, asynchronous: bool) -> None:
        """Begin to gather, where the unit is due. Collective."""
        again = self.state is UnitState.LEFT
        with beneath_transforms():
            for bucket in self.buckets:
                bucket.whole.start(asynchronous=asynchronous, again=again)
        self.state = UnitState.WHOLE if again else UnitState.COMING

    def gather(self) -> None:
        """Make the parameters whole. Collective unless it has been started."""
        if self.is_due and not self.is_whole:
            self.start(asynchronous=False)
        with beneath_transforms():
            for bucket in self.buckets:
                bucket.whole.finish()
        if not self.is_whole:
            self.state = UnitState.WHOLE

    def renew(self) -> None:
        """Take the new values of an update, if the unit stays whole over it. Collective."""
        if self.is_whole:
            self._drop()
            if self._pins:
                self._gather_private()
            else:
                self.gather()

    def pin(self) -> None:
        """Make the parameters whole for writing, too, until :meth:`unpin`. Collective."""
        self._pins.append(self.is_whole)
        self.reasons.add(Reason.PINNED)
        self._gather_private()

    def unpin(self) -> None:
        """End one :meth:`pin`; the unit is as it was before once all have ended."""
        was_whole = self._pins.pop()
        if not self._pins:
            self.reasons.discard(Reason.PINNED)
            self._drop()
            if was_whole:
                self.gather()

    def watch(self, watched: bool) -> None:
        """Notice, or not, when parameters are taken while they are whole; see ``outside_use``."""
        for bucket in self.buckets:
            if bucket.shown.told is not None:
                bucket.shown.told(not watched)

    def release(self) -> None:
        """Keep only the shards, unless there is a reason to stay whole."""
        if self.state is UnitState.SHARDED or self.reasons & _ON_ALL_RANKS:
            return
        if Reason.HELD in self.reasons:
            self.state = UnitState.LEFT
            return
        self.reasons.discard(Reason.BACKWARD)
        with beneath_transforms():
            self._drop()

    def let_go(self, *reasons: Reason) -> None:
        """End ``reasons`` to stay whole, and release the unit if no other is left."""
        self.reasons.difference_update(reasons)
        if self.state is UnitState.LEFT:
            self.state = UnitState.WHOLE
        self.release()

    def _gather_private(self) -> None:
        for bucket in self.buckets:
            bucket.whole.gather_private()
        if not self.is_whole:
            self.state = UnitState.WHOLE

    def _drop(self) -> None:
        for bucket in self.buckets:
            bucket.whole.release()
        self.state = UnitState.SHARDED


def find_units(module: nn.Module) -> list[GatheredUnit]:
    """The units of ``module`` with the parameters that each gathers: the root first.

    Besides the repeated blocks, modules that say ``drivetrain_unit = True`` are units, anywhere,
    and a parameter belongs to the innermost. One that several units use (tied weights) belongs to
    the root.
    """
    heads = {unit.module for unit in units(module)}
    paths = {module: ""}
    users: dict[nn.Parameter, set[nn.Module]] = {}

    def visit(part: nn.Module, path: str, inside: nn.Module) -> None:
        if part in heads or getattr(part, "drivetrain_unit", False):
            paths.setdefault(part, path)
            inside = part
        for parameter in part.parameters(recurse=False):
            users.setdefault(parameter, set()).add(inside)
        for name, child in part.named_children():
            visit(child, f"{path}.{name}" if path else name, inside)

    visit(module, "", module)
    own: dict[nn.Module, list[nn.Parameter]] = {part: [] for part in paths}
    for parameter in module.parameters():
        inside, *others = users[parameter]
        own[module if others else inside].append(parameter)
    return [GatheredUnit(i, paths[part], part, own[part]) for i, part in enumerate(paths)]


def without_empty(units: Sequence[GatheredUnit]) -> list[GatheredUnit]:
    """Leave out units that gather nothing, but for the root; number the others again."""
    left = [unit for unit in units if unit.parameters or not unit.number]
    for number, unit in enumerate(left):
        unit.number = number
    return left
