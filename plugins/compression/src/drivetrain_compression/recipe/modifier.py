"""What every method of compression is: one class with a config, a place in the order, three calls.

A modifier is found by its name in the entry point group ``drivetrain.modifiers``. In training it
sees all units at once, and :meth:`Modifier.step` is called once per optimizer step. After training,
when a calibration set passes through the model, it sees one unit at a time: ``begin([unit])``, one
``step`` for each batch that has passed through the unit, ``finish([unit])``, and so on to the next
unit. So a method keeps what belongs to a unit by the unit's name, and nothing of the whole model.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, ClassVar, Generic, TypeVar

from pydantic import Field
from torch import nn

from drivetrain.contracts import Section

GROUP = "drivetrain.modifiers"
"""Entry points of modifiers: name in recipes -> class."""


class Place(IntEnum):
    """When a modifier's turn comes; those of one place run in the order of the recipe."""

    REDUCE = 10
    """Leave out layers."""

    ROTATE = 20
    """Multiply weights by rotations that cancel."""

    SMOOTH = 30
    """Move the range of activations into weights."""

    PRUNE = 40
    """Set weights to zero, and choose rows, heads and channels to remove."""

    QUANTISE = 50
    """Choose the few values that weights and activations may have."""

    COMPENSATE = 60
    """Add back a part of what was lost."""

    DISTIL = 70
    """Learn from the model as it was."""


@dataclass(frozen=True)
class Progress:
    """How far the work has come when :meth:`Modifier.step` is called.

    Args:
        steps: optimizer steps that were applied; batches of the unit's calibration that passed.
        total: how many there will be, if it is known.
    """

    steps: int
    total: int | None = None


@dataclass(frozen=True)
class Target:
    """A module that a modifier works on.

    Args:
        name: dotted path in the model.
        module: the module; it has a weight.
    """

    name: str
    module: nn.Module

    def in_copy(self, model: nn.Module) -> Target:
        """The same place in a copy of the model."""
        return Target(self.name, model.get_submodule(self.name))


@dataclass(frozen=True)
class CompressionUnit:
    """A repeated block of the model, or the rest, as seen by one modifier.

    Args:
        name: path of the block; empty for what is outside of all blocks.
        module: the block; for the rest, the model.
        targets: those modules of the unit that the modifier's patterns choose, in order.
    """

    name: str
    module: nn.Module
    targets: tuple[Target, ...] = field(default=())

    def in_copy(self, model: nn.Module) -> CompressionUnit:
        """The same places in a copy of the model."""
        targets = tuple(target.in_copy(model) for target in self.targets)
        return CompressionUnit(self.name, model.get_submodule(self.name), targets)


class ModifierConfig(Section):
    """What every modifier is told.

    Patterns are searched in dotted names with ``re.search``; ``"*"`` is every module.
    """

    modules: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("*",), description="Patterns of the names of modules, searched in dotted paths."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Patterns of modules that are left as they are."
    )


ConfigT = TypeVar("ConfigT", bound=ModifierConfig)


class Modifier(ABC, Generic[ConfigT]):
    """A method of compression.

    Class attributes:
        config_class: model of the method's config.
        place: when its turn comes.
        takes: kinds of modules that it can work on; patterns choose among these.
        claims: what of a module only one modifier may decide, such as ``"weight bits"``; two
            modifiers of a recipe that claim the same of one module are refused. Empty if none.

    Args:
        config: what this one is told.
        label: what messages call it: its name, and where in the recipe.
    """

    config_class: ClassVar[type[ModifierConfig]]
    place: ClassVar[Place]
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    claims: ClassVar[str] = ""

    def __init__(self, config: ConfigT, label: str) -> None:
        self.config = config
        self.label = label

    def begin(self, units: Sequence[CompressionUnit]) -> None:
        """Prepare units, before anything passes through them.

        Args:
            units: all of the model in training; one after training.

        Raises:
            ConfigError: the method cannot be applied to one of the modules; says which and why.
        """

    def step(self, progress: Progress) -> None:
        """Go on, after an optimizer step or a batch of calibration."""

    def finish(self, units: Sequence[CompressionUnit]) -> None:
        """Leave units as they are to be kept: ordinary modules, with what was chosen put in."""

    def describe(self) -> Iterator[str]:
        """Say when it does what, one line each, for ``drivetrain explain``."""
        return iter(())
