"""Parameters of a model that are gathered and released together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.states.units import units
from drivetrain_zero.gathering.backward_hooks import beneath_transforms

if TYPE_CHECKING:
    from drivetrain_zero.gathering.backward_hooks import InputsKnown
    from drivetrain_zero.shards.bucket import ShardedBucket


@dataclass(eq=False)
class GatheredUnit:
    """Parameters that are gathered together.

    Args:
        number: position in the module's order.
        name: path of the module; empty for the root.
        module: whose forward needs them.
        buckets: where they lie.
        persistent: they stay gathered.
        kept: they do until the next update.
        awaited: they do until a backward that is to come.
        inputs: of the forward under way, until its outputs are known.
        held: somebody uses them outside of the module, until backward is over.
        rejoins: they are held where ranks that do not hold them have released them, and so take
            part in the next gather all the same.
    """

    number: int
    name: str
    module: nn.Module
    parameters: Sequence[nn.Parameter]
    buckets: list[ShardedBucket] = field(default_factory=list)
    persistent: bool = False
    pins: int = 0
    started: bool = False
    gathered: bool = False
    kept: bool = False
    awaited: bool = False
    held: bool = False
    rejoins: bool = False
    fetching: bool = False
    turn: int = 0
    inputs: InputsKnown | None = None
    _in_use: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole unit."""
        return sum(bucket.whole.numel() for bucket in self.buckets)

    def fetch_ahead(self) -> None:
        """Begin to bring this rank's shards to the device, if they are kept elsewhere."""
        if not self.started and not self.fetching:
            for bucket in self.buckets:
                bucket.fetch_ahead()
            self.fetching = True

    def start(self, *, asynchronous: bool) -> None:
        """Begin to gather. Collective."""
        with beneath_transforms():
            for bucket in self.buckets if self.rejoins or not self.started else ():
                bucket.start_gather(asynchronous=asynchronous, again=self.rejoins)
        self.started, self.rejoins = True, False

    def gather(self) -> None:
        """Make the parameters whole. Collective unless it has been started."""
        if not self.started:
            self.start(asynchronous=False)
        with beneath_transforms():
            for bucket in self.buckets:
                bucket.finish_gather()
        self.gathered = True

    def pin(self) -> None:
        """Make the parameters whole for somebody who may write, until :meth:`unpin`. Collective."""
        for bucket in self.buckets:
            bucket.gather_private()
        if not self.pins:
            self._in_use = self.gathered
        self.pins += 1
        self.started = self.gathered = True

    def unpin(self) -> None:
        """End one :meth:`pin`; the unit is as it was before once all have ended."""
        self.pins -= 1
        if self.pins:
            return
        for bucket in self.buckets:
            bucket.release()
        self.started = self.gathered = False
        if self._in_use or self.persistent:
            self.gather()

    def watch(self, watched: bool) -> None:
        """Notice, or not, when parameters are taken while they are whole; see ``outside_use``."""
        for bucket in self.buckets:
            if bucket.shown is not None:
                bucket.shown(not watched)

    def release(self) -> None:
        """Keep only the shards, unless somebody else needs more."""
        idle = not self.started and not self.fetching
        if idle or self.pins or self.persistent or self.kept:
            return
        if self.held:
            self.rejoins = True
            return
        with beneath_transforms():
            for bucket in self.buckets:
                bucket.release()
        self.started = self.gathered = self.fetching = self.awaited = False


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
