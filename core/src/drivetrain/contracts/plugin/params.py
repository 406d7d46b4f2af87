"""Parameters of optimizers and schedules, declared as data, so that a config is checked early."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from drivetrain.contracts.plugin.section import NonNegativeFloat, Section, Share
from drivetrain.wording import as_json


def _two(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"expected a list of 2 numbers, got {as_json(value)}")
    return value


Two = BeforeValidator(_two)
"""Says what is wrong with a pair that is none."""


Betas = Annotated[tuple[Share, Share], Two]


PerGroup = NonNegativeFloat | Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
"""One number for all groups, or one for each."""


class Params(Section):
    """What an optimizer or a schedule takes under ``params``, by the names that it gives them.

    Attributes:
        to_be_filled: names for which ``"auto"`` is refused although they have a default. It stands
            there for a number that a framework puts in; training with another one helps nobody.
    """

    to_be_filled: ClassVar[tuple[str, ...]] = ()


class OptimizerParams(Params):
    """What every optimizer takes."""

    to_be_filled: ClassVar[tuple[str, ...]] = ("lr",)

    lr: NonNegativeFloat = 1e-3
