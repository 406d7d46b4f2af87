"""Building blocks for the pydantic models that describe config sections.

pydantic's lax mode is wrong for hand-written JSON in three ways: it turns ``true`` into 1 and
``"3"`` into 3, and without it ``5e8`` (a float in JSON) is no integer. :data:`Int` and
:data:`Float` take numbers only, and integers in any notation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    RootModel,
    model_validator,
)

from drivetrain.errors import ConfigError
from drivetrain.paths import at_home
from drivetrain.wording import as_json

T = TypeVar("T")

NO_EFFECT = "Accepted, has no effect: "
"""What the description of a key begins with that is only there for the format's sake; the reason
follows. ``drivetrain explain`` tells those who give it."""


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {as_json(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {as_json(value)}")
    return value


def _integer(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"expected a whole number, got {as_json(value)}")
        value = int(value)
    if abs(value) >= 2**128:
        raise ValueError(f"expected a whole number below 2^128, got {as_json(value)}")
    return value


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {as_json(value)}")
    return value


Int = Annotated[int, BeforeValidator(_integer)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_integer)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
"""A number from 0 on and below 1, such as the decay of an average."""
Bool = Annotated[bool, BeforeValidator(_boolean)]


def _at_home(path: str) -> str:
    try:
        return at_home(path)
    except ConfigError as error:
        raise ValueError(str(error)) from error


PathText = Annotated[str, AfterValidator(_at_home)]
"""A path; ``~`` at its beginning is the user's home, as in a shell."""


# Deferred building leaves out the validators of sections that a config does not contain, which
# takes a fifth off the time of ``drivetrain config check``.
class Section(BaseModel):
    """A config section: frozen, and every unknown key is an error.

    Attributes:
        renamed: other name of a key -> the key; where both are given, the key counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    renamed: ClassVar[Mapping[str, str]] = {}

    @cached_property  # which pydantic does not compare
    def other_names(self) -> Mapping[str, str]:
        """Other name that was given -> what became of its value."""
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _by_other_names(cls, value: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        found = {}
        if isinstance(value, Mapping) and (others := cls.renamed.keys() & value.keys()):
            kept = {name: item for name, item in value.items() if name not in others}
            for old in sorted(others):
                key = cls.renamed[old]
                found[old] = f"no effect, as {key} is given" if key in kept else f"taken for {key}"
                kept.setdefault(key, value[old])
            value = kept
        section = build(value)
        if found:
            section.__dict__["other_names"] = found
        return section


class Scalar(RootModel[T], Generic[T]):
    """A config path whose value is one scalar, such as ``gradient_clipping: 1.0``."""

    model_config = ConfigDict(frozen=True, defer_build=True)
